"""The Makefile's list of its targets, and the tests of ``make quick``."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()


def found(pattern: str) -> str:
    match = re.search(pattern, MAKEFILE, re.MULTILINE)
    assert match is not None
    return match[1]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_alone_lists_its_targets() -> None:
    printed = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert set(re.findall(r"^  ([a-z-]+) ", printed, re.MULTILINE)) == set(found(r"^\.PHONY: (.*)$").split()) - {"help"}
    assert max(map(len, printed.splitlines())) <= 80


def test_the_tests_of_make_quick_are_there_and_in_every_room() -> None:
    names = found(r"^QUICK := ((?:.*\\\n)*.*)$").replace("\\\n", " ").split()
    for name in names:
        path, _, function = name.partition("::")
        assert f"def {function}(" in (ROOT / path).read_text() if function else (ROOT / path).is_file(), name
    assert {name.split("/")[1] for name in names} >= {"api", "docs", "engine", "kernels", "losses", "reference", "rows"}
