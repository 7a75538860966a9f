"""CONTRIBUTING.md's recipe for a policy loss, followed in a copy of the repository: the files that it names suffice."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Tapered off-policy REINFORCE (arXiv 2503.14286), per token.
LOSS = '''

def topr(rows: PolicyRows, *, ceiling: float = 1.0) -> Tensor:
    """``-A log_probs`` where A > 0, else times the detached rho, at most ``ceiling``."""
    weight = rows.log_ratio.detach().exp().clamp(max=ceiling)
    return -rows.advantages * torch.where(rows.advantages > 0, 1.0, weight) * rows.log_probs


register_policy_loss("topr", topr, zero_without_advantage=True)
'''
ORACLE = '''

def topr_loss(ratio: Tensor, log_probs: Tensor, advantages: Tensor, ceiling: float = 1.0) -> Tensor:
    """``-A logp`` where A > 0, else ``-sg(min(rho, ceiling)) A logp``."""
    tapered = torch.minimum(ratio.detach(), torch.full_like(ratio, ceiling))
    return -torch.where(advantages > 0, torch.ones_like(ratio), tapered) * advantages * log_probs
'''
BRANCH = """    if config.loss_type == "topr":
        return topr_loss(ratio, log_probs, advantages, **dict(getattr(config, "loss_options", ())))
"""
LIBRARY_FILE, ORACLE_FILE = "srpo_kernels/losses/policy.py", "reference/policy.py"
EDITS: dict[str, Callable[[str], str]] = {
    LIBRARY_FILE: lambda text: text.replace('"sapo"]', '"sapo", "topr"]') + LOSS,
    ORACLE_FILE: lambda text: (
        text.replace("    if config.loss_type not in CLIPPED", BRANCH + "    if config.loss_type not in CLIPPED")
        + ORACLE
    ),
    "README.md": lambda text: text.replace("`sapo`, `reinforce`", "`sapo`, `reinforce`, `topr`"),
}
TESTS = ["api/test_loss_parity.py", "api/test_fused_loss.py", "engine/test_plan.py", "docs/test_readme.py"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with the loss in it."""
    folder = tmp_path_factory.mktemp("recipe") / "repository"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "runs", "results", "figures")
    shutil.copytree(ROOT, folder, symlinks=True, ignore=ignored)
    for name, edit in EDITS.items():
        text = (folder / name).read_text()
        changed = edit(text)
        assert "topr" in changed and "topr" not in text
        (folder / name).write_text(changed)
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def verify(folder: Path) -> tuple[int, list[bool]]:
    """The exit code, and whether each check of the new loss passed."""
    options = ["--device", "cpu", "--backend", "torch", "--quick", "--no-timing", "--only", "policy loss"]
    code = run(folder, "srpo_kernels.verify", *options, "--json", "outcome.json").returncode
    checks = json.loads((folder / "outcome.json").read_text())["checks"]
    return code, [check["passed"] for check in checks if check["case"] == "loss_type=topr"]


def test_the_recipe_names_the_files_that_are_edited() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    recipe = text.partition("## A policy loss\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\d\. `([\w/.]+)`", recipe, re.MULTILINE)) == EDITS.keys()


def test_every_file_that_the_recipes_name_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:srpo_kernels|reference|tests|tools|docs)/[\w/]*(?:\.\w+)?|[A-Z]\w+\.md|\.ci/run)`", text)
    assert len(named) > 20
    assert all((ROOT / name).exists() for name in named), [name for name in named if not (ROOT / name).exists()]


def test_the_new_loss_is_held_to_the_oracle(copy: Path) -> None:
    tested = run(copy, "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in TESTS), "-k", "topr")
    assert tested.returncode == 0, tested.stdout
    passed = re.search(r"(\d+) passed", tested.stdout)
    assert passed is not None and int(passed[1]) >= 6, tested.stdout
    assert verify(copy) == (0, [True, True])


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        (LIBRARY_FILE, "clamp(max=ceiling)\n    return -rows", "clamp(max=2.0 * ceiling)\n    return -rows"),
        (ORACLE_FILE, "torch.full_like(ratio, ceiling)", "torch.full_like(ratio, 2.0 * ceiling)"),
    ],
    ids=["library", "oracle"],
)
def test_a_wrong_formula_fails(copy: Path, name: str, right: str, wrong: str) -> None:
    text = (copy / name).read_text()
    assert text.count(right) == 1
    try:
        (copy / name).write_text(text.replace(right, wrong))
        code, passed = verify(copy)
    finally:
        (copy / name).write_text(text)
    assert code == 1
    # Of fp32 and bf16, whose roundings hide a part of it.
    assert not all(passed) and len(passed) == 2
