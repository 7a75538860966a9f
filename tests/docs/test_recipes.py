"""CONTRIBUTING.md's recipes for a policy loss and a divergence, followed in a copy: the files that they name do."""

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
    """``-A log_probs`` where A > 0, else times the detached rho, at most ``ceiling``.

    Source: TOPR (arXiv 2503.14286). Elsewhere: nobody.
    """
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
NEXT_BRANCH = "    if config.loss_type not in CLIPPED"
# KL(p || m) alone, of the two that jsd is made of.
NUMBERS = """        case "student_js":
            return Mixture(alpha, "teacher", 1.0, 0.0)
        case unknown:
            refuse_name("divergence", unknown)
"""
FORMULA = '''

def student_js(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """``KL(p || m)``, ``m = (1 - alpha) p + alpha q``."""
    log_m = torch.logaddexp(log_p + math.log1p(-alpha), log_q + math.log(alpha))
    return reverse_kl(log_p, log_m)
'''
LIBRARY_FILE, ORACLE_FILE = "srpo_kernels/losses/policy.py", "reference/policy.py"
MIXTURE_FILE, DIVERGENCE_FILE = "srpo_kernels/rows/mixture.py", "reference/distillation.py"
Edits = dict[str, Callable[[str], str]]
RECIPES: dict[str, tuple[str, Edits]] = {
    "A policy loss": (
        "topr",
        {
            LIBRARY_FILE: lambda text: text.replace('"vespo",', '"topr", "vespo",', 1) + LOSS,
            ORACLE_FILE: lambda text: (
                text.replace(
                    "    if config.loss_type not in CLIPPED", BRANCH + "    if config.loss_type not in CLIPPED"
                )
                + ORACLE
            ),
            "README.md": lambda text: text.replace("`sapo`, `reinforce`", "`sapo`, `reinforce`, `topr`"),
        },
    ),
    "A divergence": (
        "student_js",
        {
            MIXTURE_FILE: lambda text: text.replace('Literal["jsd", ', 'Literal["jsd", "student_js", ', 1).replace(
                """        case unknown:
            refuse_name("divergence", unknown)
""",
                NUMBERS,
            ),
            DIVERGENCE_FILE: lambda text: (
                text.replace(
                    """    if kind == "jsd":
""",
                    """    if kind == "student_js":
        return student_js(log_p, log_q, alpha)
    if kind == "jsd":
""",
                )
                + FORMULA
            ),
            "README.md": lambda text: text.replace("(`jsd`, ", "(`jsd`, `student_js`, "),
        },
    ),
}
# Each with the option that takes its name.
NEW = {"topr": "loss_type", "student_js": "divergence"}
TESTS = ["api/test_loss_parity.py", "api/test_fused_loss.py", "engine/test_plan.py", "docs/test_readme.py"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with the loss and the divergence in it."""
    folder = tmp_path_factory.mktemp("recipe") / "repository"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "runs", "results", "figures")
    shutil.copytree(ROOT, folder, symlinks=True, ignore=ignored)
    for name, edits in RECIPES.values():
        for file, edit in edits.items():
            text = (folder / file).read_text()
            changed = edit(text)
            assert name in changed and name not in text
            (folder / file).write_text(changed)
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def verify(folder: Path) -> tuple[int, dict[str, list[bool]]]:
    """The exit code, and whether each check of what is new passed."""
    cases = {name: f"{kind}={name}" for name, kind in NEW.items()}
    options = ["--device", "cpu", "--backend", "torch", "--no-timing", "--only", *cases.values()]
    code = run(folder, "srpo_kernels.verify", *options, "--json", "outcome.json").returncode
    checks = json.loads((folder / "outcome.json").read_text())["checks"]
    return code, {name: [check["passed"] for check in checks if check["case"] == case] for name, case in cases.items()}


@pytest.mark.parametrize("title", RECIPES)
def test_the_recipe_names_the_files_that_are_edited(title: str) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    recipe = text.partition(f"## {title}\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\d\. `([\w/.]+)`", recipe, re.MULTILINE)) == RECIPES[title][1].keys()


def test_every_file_that_the_recipes_name_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:srpo_kernels|reference|tests|tools|docs)/[\w/]*(?:\.\w+)?|[A-Z]\w+\.md|\.ci/run)`", text)
    assert len(named) > 20
    assert all((ROOT / name).exists() for name in named), [name for name in named if not (ROOT / name).exists()]


def test_what_is_new_is_held_to_the_oracle(copy: Path) -> None:
    files = [f"tests/{file}" for file in TESTS]
    tested = run(copy, "pytest", "-q", "-rp", "-p", "no:cacheprovider", *files, "-k", " or ".join(NEW))
    assert tested.returncode == 0, tested.stdout
    code, checks = verify(copy)
    assert code == 0
    for name in NEW:
        assert len(re.findall(rf"^PASSED .*{name}", tested.stdout, re.MULTILINE)) >= 6, tested.stdout
        assert checks[name] and all(checks[name])


@pytest.mark.parametrize(
    "faults",
    [
        {
            LIBRARY_FILE: ("clamp(max=ceiling)\n    return -rows", "clamp(max=2.0 * ceiling)\n    return -rows"),
            MIXTURE_FILE: ('Mixture(alpha, "teacher", 1.0, 0.0)', 'Mixture(alpha, "teacher", 1.0, 0.1)'),
        },
        {
            ORACLE_FILE: ("torch.full_like(ratio, ceiling)", "torch.full_like(ratio, 2.0 * ceiling)"),
            DIVERGENCE_FILE: ("return reverse_kl(log_p, log_m)", "return reverse_kl(log_q, log_m)"),
        },
    ],
    ids=["library", "oracle"],
)
def test_a_wrong_formula_fails(copy: Path, faults: dict[str, tuple[str, str]]) -> None:
    """One of each kind at a time: neither touches what is new of the other."""
    texts = {name: (copy / name).read_text() for name in faults}
    try:
        for name, (right, wrong) in faults.items():
            assert texts[name].count(right) == 1
            (copy / name).write_text(texts[name].replace(right, wrong))
        code, checks = verify(copy)
    finally:
        for name, text in texts.items():
            (copy / name).write_text(text)
    assert code == 1
    for name in NEW:
        assert checks[name] and not all(checks[name]), name
