"""Two families of arithmetic problems that check themselves, as text of few characters."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from random import Random
from typing import Literal, NamedTuple

Family = Literal["sum", "split"]

# Every character that a prompt or a reply can have.
CHARACTERS = "0123456789+=~[]"
# The longest reply, its end included: 20+20=40+20=60.
MAX_REPLY = 15

_STEPS = re.compile(r"(\d+)\+(\d+)=(\d+)\+(\d+)=(\d+)")
_LEAST, _MOST = 2, 20
_HELD_OUT = 5


class Problem(NamedTuple):
    """A question with many correct replies: one is drawn by ``solve``, any is known by ``correct``."""

    family: Family
    question: str
    solve: Callable[[Random], str]
    correct: Callable[[str], bool]

    @property
    def held_out(self) -> bool:
        """Whether the problem is for evaluation: one in five, by its text."""
        return zlib.crc32(self.question.encode()) % _HELD_OUT == 0


def draw(family: Family, source: Random, *, held_out: bool) -> Problem:
    """A problem of the family, from those that are held out or from the others."""
    while True:
        problem = _sum(source) if family == "sum" else _split(source)
        if problem.held_out == held_out:
            return problem


def with_solution(question: str, solution: str) -> str:
    """The question as the self-teacher sees it, with a correct reply of a sibling."""
    return f"{question}[{solution}]"


def _sum(source: Random) -> Problem:
    """Three numbers to add: ``18+15+7`` is solved by ``15+7=22+18=40``. The last number counts."""
    numbers = [source.randint(_LEAST, _MOST) for _ in range(3)]

    def solve(source: Random) -> str:
        return _steps(source.sample(numbers, 3))

    def correct(reply: str) -> bool:
        match = _STEPS.fullmatch(reply)
        return match is not None and match[5] == str(sum(numbers))

    return Problem("sum", "+".join(map(str, numbers)), solve, correct)


def _split(source: Random) -> Problem:
    """A sum to split, with one part given: ``37~8`` is solved by three different parts, as in ``20+8=28+9=37``."""
    given, *free = source.sample(range(_LEAST, _MOST + 1), 3)
    total = given + sum(free)

    def right(parts: list[int]) -> bool:
        apart = len(set(parts)) == 3 and all(_LEAST <= part <= _MOST for part in parts)
        return apart and given in parts and sum(parts) == total

    def solve(source: Random) -> str:
        rest = total - given
        firsts = range(max(_LEAST, rest - _MOST), min(_MOST, rest - _LEAST) + 1)
        parts = [given, *source.choice([(a, rest - a) for a in firsts if right([given, a, rest - a])])]
        return _steps(source.sample(parts, 3))

    def correct(reply: str) -> bool:
        match = _STEPS.fullmatch(reply)
        return match is not None and right([int(match[i]) for i in (1, 2, 4)]) and match[5] == str(total)

    return Problem("split", f"{total}~{given}", solve, correct)


def _steps(numbers: list[int]) -> str:
    a, b, c = numbers
    return f"{a}+{b}={a + b}+{c}={a + b + c}"
