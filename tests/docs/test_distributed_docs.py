"""docs/distributed.md shows code that runs: the programs in examples/distributed have every line of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "distributed.md").read_text()
PROGRAMS = [path.read_text() for path in sorted((ROOT / "examples" / "distributed").glob("*.py"))]
BLOCKS = re.findall(r"^```python\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)


def stripped(code: str) -> str:
    """Lines without indentation, and no empty ones."""
    return "\n" + "\n".join(line.strip() for line in code.splitlines() if line.strip()) + "\n"


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_is_part_of_a_program(block: str) -> None:
    assert any(stripped(block) in stripped(program) for program in PROGRAMS)


def test_every_program_is_linked() -> None:
    linked = set(re.findall(r"\(\.\./(examples/distributed/\w+\.py)\)", DOCUMENT))
    assert all((ROOT / path).exists() for path in linked)
    programs = {path.name for path in (ROOT / "examples" / "distributed").glob("*.py")} - {"__init__.py"}
    assert {Path(path).name for path in linked} == programs
