"""``python -m tools.peers.suites``: ours are in the place of a peer's, and every test has one of three outcomes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pandas")
pytest.importorskip("rich")
pytest.importorskip("tyro")

import pandas as pd

from tools.peers.suites import __main__ as command
from tools.peers.suites import machine

_THEIRS = """
import tensordict

def compute_grpo_outcome_advantage(token_level_rewards, response_mask, index):
    raise AssertionError("theirs")
"""
_TESTS = """
import pytest
import torch
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage as renamed

def advantages():
    rewards = torch.tensor([[0.0, 1.0], [0.0, 3.0]])
    return renamed(rewards, torch.ones(2, 2), torch.tensor([7, 7]))[0]

def test_values():
    torch.testing.assert_close(advantages()[:, 0] * 2**0.5, torch.tensor([-1.0, 1.0]))

def test_wrong():
    assert advantages().sum() > 1

def test_gae():
    raise RuntimeError

def test_of_their_own():
    pass

def test_that_is_skipped():
    pytest.skip("no GPU")
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the suite of verl looks for, and nothing else."""
    theirs, tests = tmp_path / "verl/trainer/ppo", tmp_path / "tests/trainer/ppo"
    for folder in (theirs, tests):
        folder.mkdir(parents=True)
    (theirs / "core_algos.py").write_text(_THEIRS)
    (tests / "test_core_algos_on_cpu.py").write_text(_TESTS)
    return tmp_path


def test_every_test_has_one_of_three_outcomes(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = command.run("verl", checkout, "torch")
    found = {outcome["test"].split("::")[1]: (outcome["outcome"], outcome["reason"]) for outcome in outcomes}
    wrong = found.pop("test_wrong")
    assert wrong[0] == "failed" and "assert" in wrong[1]
    assert found == {
        "test_values": ("passed", ""),
        "test_gae": ("no counterpart", "advantages from a critic's values"),
        "test_of_their_own": ("no counterpart", "computes none of our functions"),
        "test_that_is_skipped": ("no counterpart", "skipped by the test: no GPU"),
    }
    assert command.show(pd.DataFrame(outcomes), "torch") == 1
    printed = capsys.readouterr().out
    assert "passed" in printed and "no counterpart" in printed and "failed" in printed
    assert command.show(pd.DataFrame([one for one in outcomes if one["outcome"] != "failed"]), "torch") == 0


def test_a_sample_is_of_those_with_a_counterpart(checkout: Path) -> None:
    outcomes = command.run("verl", checkout, "torch", every=2)
    assert [x["test"].split("::")[1] for x in outcomes] == ["test_values", "test_gae", "test_of_their_own"]


def test_a_file_that_is_not_there_is_named(checkout: Path) -> None:
    (checkout / "tests/trainer/ppo/test_core_algos_on_cpu.py").unlink()
    with pytest.raises(SystemExit, match=r"test_core_algos_on_cpu.py.*another version of verl"):
        command.run("verl", checkout, "torch")


def test_a_file_that_cannot_be_imported_has_failed(checkout: Path) -> None:
    (checkout / "tests/trainer/ppo/test_core_algos_on_cpu.py").write_text("import nowhere_to_be_found")
    (outcome,) = command.run("verl", checkout, "torch")
    assert outcome["outcome"] == "failed" and "nowhere_to_be_found" in outcome["reason"]


def test_tensors_that_are_asked_for_on_cuda_are_on_the_cpu() -> None:
    with machine.CpuForCuda():
        tensors = torch.zeros(2, device="cuda"), torch.zeros(2).to("cuda:0"), torch.zeros(2).cuda()
        module = torch.nn.Linear(2, 2).to(torch.device("cuda"))
    assert {tensor.device.type for tensor in (*tensors, *module.parameters())} == {"cpu"}


def test_a_faked_package_is_whatever_is_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    machine.fake(["nowhere_to_be_found"])
    try:
        package = importlib.import_module("nowhere_to_be_found")
        inner = importlib.import_module("nowhere_to_be_found.inner.most")
    finally:
        for name in [name for name in sys.modules if name.startswith("nowhere_to_be_found")]:
            del sys.modules[name]

    @package.decorator
    def function() -> int:
        return 1

    class Child(inner.Parent):  # type: ignore[misc]
        x: package.Tensor[int]

    assert function() == 1 and Child().__class__ is Child
