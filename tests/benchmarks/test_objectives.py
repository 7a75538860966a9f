"""The benchmark of losses of one's own on a tiny head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro", reason="the benchmarks' command needs the extra bench")
pytest.importorskip("rich", reason="the benchmarks' tables need the extra bench")

from benchmarks import objectives
from benchmarks.own_losses import LOSSES, WAYS
from benchmarks.results import read_csv
from srpo_kernels.verify.batches import Case, make_batch
from tests.benchmarks.conftest import Run


def test_a_loss_of_ones_own_is_the_same_in_every_way(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "objectives.csv"
    ways = [name for name in WAYS if name != "naive-compiled"]
    options = ["--heads", "tiny", "--rounds", "1", "--threads", "1", "--device", "cpu", "--out", out]
    run("objectives", *options, "--no-memory", "--ways", "bare", *ways)
    cells = read_csv(out).set_index(["workload", "provider", "metric"])
    for workload in LOSSES:
        for way in ways:
            if way == "srpo_loss" and workload not in ("policy", "support"):
                assert cells.loc[workload, way, "seconds"]["reason"] == "GRPO alone"
                continue
            if (way, workload) == ("token_stats", "certainty"):
                assert cells.loc[workload, way, "seconds"]["reason"] == "one divergence a call"
                continue
            assert cells.loc[workload, way, "ratio_to_bare"]["median"] > 0
            for quantity in ("loss", "grad_hidden", "grad_weight"):
                assert cells.loc[workload, way, f"{quantity}_difference"]["median"] < 1e-5
    lines, caption = objectives.table(read_csv(out))
    assert not lines["fused_loss"].str.contains("/").any()
    assert lines["loss"].tolist() == [loss.meaning for loss in LOSSES.values()]
    assert lines["srpo_loss"].tolist()[1] == "GRPO alone"
    assert "`fused_loss`" in caption


def test_a_loss_of_ones_own_has_a_time_and_a_peak(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "objectives.csv"
    options = ["--heads", "tiny", "--losses", "grpo", "--rounds", "1", "--out", out]
    run("objectives", *options, "--ways", "bare", "fused_loss")
    lines, _ = objectives.table(read_csv(out))
    assert lines["fused_loss"].str.count("/").tolist() == [Path("/proc/self/status").exists()]


@pytest.mark.slow
def test_a_compiled_loss_of_ones_own_is_the_same() -> None:
    for workload in LOSSES:
        batch = make_batch(Case("tiny", workload, 128))
        expected, compiled = (objectives.prepare(way, batch)() for way in ("naive", "naive-compiled"))
        torch.testing.assert_close(compiled[:3], expected[:3])
