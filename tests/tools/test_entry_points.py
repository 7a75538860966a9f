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
# A loop to copy from: its imports stand at its top.
LATE = {"examples.train_smollm2"}
COMMAND_LINE = re.compile(r"\bparse\(Options|\bArgumentParser\(|\bcommands\.run\(")


def entry_points() -> Iterator[str]:
    """What ``python -m`` runs and has options: packages, and modules by themselves."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text()
            if 'if __name__ == "__main__":' in text and COMMAND_LINE.search(text):
                yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")


MODULES = sorted(set(entry_points()) - LATE)

# All in one process, in turn.
ASK = """
import contextlib, io, json, runpy, sys
answers, modules = {}, sys.argv[1:]
for module in modules:
    sys.argv = [module, "--help"]
    code, text, errors, before = None, io.StringIO(), io.StringIO(), set(sys.modules)
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(errors):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
    answers[module] = [code, text.getvalue(), errors.getvalue(), sorted(set(sys.modules) - before)]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[int, str, str, list[str]]]:
    environment: dict[str, Any] = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    environment |= {"COLUMNS": "80", "PYTHONPATH": os.pathsep.join([str(ROOT), *verl_path.PATHS])}
    done = subprocess.run(
        [sys.executable, "-c", ASK, *MODULES], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_the_commands_of_the_documents_are_among_them() -> None:
    commands = re.findall(r"python -m ([\w.]+)", (ROOT / "CONTRIBUTING.md").read_text())
    ours = {name for name in commands if name.partition(".")[0] in FOLDERS}
    assert len(ours) >= 5 and ours <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_help_is_readable_and_quick(module: str, answers: dict[str, tuple[int, str, str, list[str]]]) -> None:
    if module.startswith("srpo_kernels.integrations.verl") and not verl_path.INSTALLED:
        pytest.skip("verl is not installed")
    code, text, errors, imported = answers[module]
    assert (code, errors) == (0, "")
    assert f"usage: python -m {module}" in text
    assert max(map(len, text.splitlines())) <= 80
    # No color in a pipe.
    assert "\x1b" not in text
    assert not {"torch", "pandas", "transformers", "triton", "matplotlib", "verl"} & set(imported)
