"""What pyproject.toml admits, what constraints.txt pins, and what docs/versions.md says was tried are one story."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import srpo_kernels as sk

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}
REQUIREMENTS = [Requirement(line) for line in PROJECT["dependencies"]] + [x for extra in EXTRAS.values() for x in extra]
PINNED = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_what_is_pinned_is_admitted(requirement: Requirement) -> None:
    if requirement.name in PINNED:
        assert Version(PINNED[requirement.name]) in requirement.specifier


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_extra_is_bound_on_both_sides(extra: str) -> None:
    others = [requirement for requirement in EXTRAS[extra] if requirement.name != PROJECT["name"]]
    assert not [str(x) for x in others if Version("0") in x.specifier or Version("999") in x.specifier]


def test_the_trl_extra_asks_for_transformers_5() -> None:
    [transformers] = [requirement for requirement in EXTRAS["trl"] if requirement.name == "transformers"]
    assert Version("4.57.1") not in transformers.specifier


def test_the_versions_that_were_tried_are_admitted() -> None:
    text = (ROOT / "docs" / "versions.md").read_text()
    tried = re.findall(r"^\| ([\d.]+)[^|]*\| ([\d.]+) \| ([\d.]+) \| `make", text, re.MULTILINE)
    assert (PINNED["torch"], PINNED["triton"], PINNED["numpy"]) in tried
    for name, column in (("torch", 0), ("triton", 1)):
        versions = sorted(Version(row[column]) for row in tried)
        for requirement in REQUIREMENTS:
            if requirement.name == name:
                assert all(version in requirement.specifier for version in versions)
                # Nothing below the oldest one, and no minor version above the newest one that is bound.
                assert Version(f"{versions[0].major}.{versions[0].minor - 1}") not in requirement.specifier
    triton = EXTRAS["triton"][0].specifier
    newest = max(Version(row[1]) for row in tried)
    assert Version(f"{newest.major}.{newest.minor + 1}") not in triton


def test_there_is_one_version() -> None:
    assert "version" in PROJECT["dynamic"]
    assert re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE) == [sk.__version__]


def test_continuous_integration_tries_versions_that_are_admitted() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    matrix = re.findall(r'python: "([\d.]+)", torch: "([\d.]+)"', workflow)
    assert (matrix[0][1], PINNED["torch"]) == ("2.10.0", matrix[1][1])
    [torch] = [requirement for requirement in REQUIREMENTS if requirement.name == "torch"]
    assert all(Version(version) in torch.specifier for _, version in matrix)
    pythons = {f"Programming Language :: Python :: {python}" for python, _ in matrix}
    assert pythons <= set(PROJECT["classifiers"])
