"""The benchmark of trainers, with a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", "1.16", reason="the trl integration needs trl >= 1.16")

from benchmarks.options import Branch, Sizes
from benchmarks.trainers import SIDES, Step
from benchmarks.trl_steps import prepare


@pytest.mark.parametrize("silent", [0.0, 0.5])
@pytest.mark.parametrize("branch", ["grpo", "sdpo"])
def test_both_sides_of_the_benchmark_compute_the_same_gradient(branch: Branch, silent: float, tmp_path: Path) -> None:
    step = Step(branch, silent, Sizes(layers=1, vocab=64, hidden=16, length=8))
    ours, theirs = (prepare(side, step, tmp_path)() for side in SIDES)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    assert ours.norm() > 0
