"""``--help`` of every command: lines that a terminal holds, and no package that takes long is waited for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tyro", reason="commands read their options with tyro")
pytest.importorskip("rich", reason="commands print with rich")
pytest.importorskip("pandas", reason="commands that print tables import pandas")

from tests import verl_path

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "examples", "reference", "srpo_kernels", "studies", "tests", "tools")
COMMAND_LINE = re.compile(r"\bparse\(Options|\bArgumentParser\(|\bcommands\.run\(")
SUB_COMMAND = re.compile(r'^ +"(\w+)": \(', re.MULTILINE)
SLOW = {"datasets", "matplotlib", "numpy", "pandas", "reasoning_gym", "scipy"}
SLOW |= {"torch", "transformers", "triton", "verl"}


def entry_points() -> Iterator[str]:
    """What ``python -m`` runs and has options: packages, modules by themselves, and the sub-commands of either."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text()
            found = COMMAND_LINE.search(text)
            if 'if __name__ == "__main__":' in text and found:
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
                yield module
                if found[0].startswith("commands"):
                    yield from (f"{module} {name}" for name in SUB_COMMAND.findall(text))


COMMANDS = [name for name in entry_points() if verl_path.INSTALLED or ".verl" not in name]

# All in one process, in turn: how each ends, what it prints, and what it imports.
ASK = """
import contextlib, io, json, runpy, sys
answers = {}
for line in sys.argv[1:]:
    sys.argv = line.split()
    code, text, errors, before = None, io.StringIO(), io.StringIO(), set(sys.modules)
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(errors):
        try:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
    answers[line] = [code, text.getvalue(), errors.getvalue(), sorted(set(sys.modules) - before)]
print(json.dumps(answers))
"""
Answers = dict[str, tuple[int, str, str, list[str]]]


@pytest.fixture(scope="module")
def answers() -> Answers:
    environment: dict[str, Any] = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    environment |= {"COLUMNS": "80", "PYTHONPATH": os.pathsep.join([str(ROOT), *verl_path.PATHS])}
    lines = [f"{command} {option}" for option in ("--help", "--no-such-option") for command in COMMANDS]
    run = [sys.executable, "-c", ASK, *lines]
    return json.loads(subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, check=True).stdout)


def test_the_commands_of_the_documents_are_among_them() -> None:
    commands = re.findall(r"python -m ([\w.]+)", (ROOT / "CONTRIBUTING.md").read_text())
    ours = {name for name in commands if name.partition(".")[0] in FOLDERS}
    assert len(ours) >= 5 and ours <= set(COMMANDS)


def test_sub_commands_are_among_them() -> None:
    assert {"benchmarks report", "studies.learning draw"} < set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_readable_and_quick(command: str, answers: Answers) -> None:
    code, text, errors, imported = answers[f"{command} --help"]
    assert (code, errors) == (0, "")
    assert f"usage: python -m {command}" in text
    assert max(map(len, text.splitlines())) <= 80
    # No color in a pipe.
    assert "\x1b" not in text
    assert not SLOW & set(imported)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="this system has no pseudo-terminals")
def test_no_color_is_plain_text_on_a_terminal() -> None:
    terminal, end = os.openpty()
    command = [sys.executable, "-m", "studies.learning", "choices", "--help"]
    environment = os.environ | {"NO_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "80"}
    subprocess.run(command, cwd=ROOT, env=environment, stdout=end, check=True)
    shown = os.read(terminal, 4096)
    assert b"usage: python -m studies.learning choices" in shown and b"\x1b" not in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_ends_with_2_and_no_output(command: str, answers: Answers) -> None:
    code, text, errors, _ = answers[f"{command} --no-such-option"]
    assert (code, text) == (2, "") and errors
