"""Families of problems that check themselves, as text of few characters."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from random import Random
from typing import Literal, NamedTuple

Family = Literal["sum", "split", "chain-3", "chain-6", "chain-12", "chain-20", "sort-3", "sort-4", "sort-6", "sort-8"]

# Every character that a prompt or a reply can have.
CHARACTERS = "0123456789+=~[]"

_STEPS = re.compile(r"(\d+)\+(\d+)=(\d+)\+(\d+)=(\d+)")
_LEAST, _MOST = 2, 20
_HELD_OUT = 5


class Problem(NamedTuple):
    """A question: one correct reply is drawn by ``solve``, any is known by ``correct``."""

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
        problem = _draw(family, source)
        if problem.held_out == held_out:
            return problem


def max_reply(family: Family) -> int:
    """Characters of the longest correct reply, its end included."""
    if family in ("sum", "split"):
        return len("20+20=40+20=60") + 1
    return len(_draw(family, Random(0)).solve(Random(0))) + 1


def _draw(family: Family, source: Random) -> Problem:
    kind, _, length = family.partition("-")
    match kind:
        case "sum":
            return _sum(source)
        case "split":
            return _split(source)
        case "chain":
            return _chain(family, source, int(length))
        case _:
            return _sort(family, source, int(length))


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


def _chain(family: Family, source: Random, length: int) -> Problem:
    """Digits to add modulo 10, one after the other: ``759`` is solved by ``7+5=2+9=1``. One reply is right."""
    digits = [source.randint(0, 9) for _ in range(length)]
    right, total = str(digits[0]), digits[0]
    for digit in digits[1:]:
        total = (total + digit) % 10
        right += f"+{digit}={total}"
    return Problem(family, "".join(map(str, digits)), lambda _: right, lambda reply: reply == right)


def _sort(family: Family, source: Random, length: int) -> Problem:
    """Different digits: each step takes out the least or the greatest, ``759`` as in ``5~79=9~7=7``."""
    digits = "".join(map(str, source.sample(range(10), length)))

    def solve(source: Random) -> str:
        rest, steps = digits, []
        while len(rest) > 1:
            taken = source.choice((min(rest), max(rest)))
            rest = rest.replace(taken, "")
            steps.append(f"{taken}~{rest}")
        return "=".join([*steps, rest])

    def correct(reply: str) -> bool:
        *steps, last = reply.split("=")
        rest = digits
        for step in steps:
            taken, _, left = step.partition("~")
            if len(rest) < 2 or taken not in (min(rest), max(rest)) or left != rest.replace(taken, ""):
                return False
            rest = left
        return len(rest) == 1 and last == rest

    return Problem(family, digits, solve, correct)
