"""Results of transcendentals that are read too early: what AMD's compiler sees to, but not within inline assembly.

Sources: LLVM's GCNHazardRecognizer, ``fixVALUTransUseHazard`` (RDNA 3) and ``checkVALUHazards`` (CDNA 3).
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

# What has to lie between a transcendental and a vector instruction that reads its result: an instruction of any kind
# (CDNA 3), or a wait for it, six vector instructions or two transcendentals (RDNA 3).
Hazard = Literal["state", "result"]

_MOST_VECTOR, _MOST_TRANSCENDENTAL = 5, 1

_LINE = re.compile(r"\s+(?P<opcode>[a-z]\w+)(?P<operands>[^;]*)")
_LABEL = re.compile(r"(\.LBB\w+):")
_TRANSCENDENTAL = re.compile(r"v_(?:exp|log|rcp|rsq|sqrt|sin|cos)_")
_REGISTERS = re.compile(r"\bv(?:(\d+)|\[(\d+):(\d+)\])")
# They come back after all vector instructions before them, or ask for that.
_WAITS = re.compile(r"(?:global|buffer|flat|scratch|ds|exp)_|s_(?:waitcnt_depctr|wait_alu)$")


class _Line(NamedTuple):
    opcode: str
    writes: frozenset[int]
    reads: frozenset[int]
    label: str | None


def early_reads(text: str, hazard: Hazard) -> int:
    """How many transcendentals of a function in the assembler's text have a reader that comes too early."""
    lines, labels = _parse(text)
    return sum(
        bool(_TRANSCENDENTAL.match(line.opcode)) and _is_read_early(lines, labels, index, hazard)
        for index, line in enumerate(lines)
    )


def _is_read_early(lines: list[_Line], labels: dict[str, int], index: int, hazard: Hazard) -> bool:
    result = lines[index].writes
    pending, seen = [(following, 0, 0) for following in _successors(lines, labels, index)], set()
    while pending:
        at = pending.pop()
        if at in seen:
            continue
        seen.add(at)
        i, vector, transcendental = at
        line = lines[i]
        if _WAITS.match(line.opcode) or vector > _MOST_VECTOR or transcendental > _MOST_TRANSCENDENTAL:
            continue
        if line.opcode.startswith("v_"):
            is_transcendental = bool(_TRANSCENDENTAL.match(line.opcode))
            if line.reads & result and not (hazard == "state" and is_transcendental):
                return True
            if result <= line.writes:
                continue
            vector, transcendental = vector + 1, transcendental + is_transcendental
        if hazard == "result":
            pending += [(following, vector, transcendental) for following in _successors(lines, labels, i)]
    return False


def _successors(lines: list[_Line], labels: dict[str, int], index: int) -> list[int]:
    line = lines[index]
    following = [] if line.opcode in ("s_branch", "s_endpgm", "s_setpc_b64") else [index + 1]
    if line.label is not None:
        following.append(labels[line.label])
    return [i for i in following if i < len(lines)]


def _parse(text: str) -> tuple[list[_Line], dict[str, int]]:
    lines: list[_Line] = []
    labels: dict[str, int] = {}
    for row in text.split("\n.Lfunc_end", 1)[0].splitlines():
        if match := _LABEL.match(row):
            labels[match[1]] = len(lines)
        elif match := _LINE.match(row):
            lines.append(_line(match["opcode"], match["operands"]))
    return lines, labels


def _line(opcode: str, operands: str) -> _Line:
    writes: set[int] = set()
    reads: set[int] = set()
    # Two instructions may be issued as one.
    for half in f"{opcode} {operands}".split("::"):
        name, _, rest = half.strip().partition(" ")
        target, *sources = rest.split(",")
        writes |= _registers(target)
        reads |= _registers(",".join(sources))
        if "mac_" in name:
            reads |= _registers(target)
    label = operands.strip() if "branch" in opcode else None
    return _Line(opcode, frozenset(writes), frozenset(reads), label)


def _registers(operands: str) -> set[int]:
    found: set[int] = set()
    for match in _REGISTERS.finditer(operands):
        first, last = (match[1], match[1]) if match[1] is not None else (match[2], match[3])
        found |= set(range(int(first), int(last) + 1))
    return found
