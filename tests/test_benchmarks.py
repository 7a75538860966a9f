"""The benchmark on a tiny head, end to end."""

from __future__ import annotations

import csv
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro")
pytest.importorskip("rich")

from benchmarks.cases import Case, make_batch
from benchmarks.memory import measure_peak
from benchmarks.providers import PROVIDERS, prepare
from benchmarks.speed import compare

ROUTED = Case("tiny", "routed", 1_024)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
        runpy.run_module("benchmarks", run_name="__main__")

    return call


def test_speed_compares_every_provider_on_every_workload(
    run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl")
    out = tmp_path / "new" / "speed.csv"
    threads = str(torch.get_num_threads())
    run("speed", "--heads", "tiny", "--rounds", "2", "--no-memory", "--threads", threads, "--out", str(out))
    printed = capsys.readouterr().out
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for workload in ("policy", "distillation", "routed"):
        assert f"tiny, {workload}: H = 32, V = 500, 128 rows" in printed
        cells = {(row["provider"], row["metric"]): row for row in rows if row["workload"] == workload}
        for provider in PROVIDERS:
            assert provider in printed
            seconds = cells[provider, "seconds"]
            assert 0 < float(seconds["p20"]) <= float(seconds["median"]) <= float(seconds["p80"])
            assert (provider, "ratio_to_bare") in cells
        for provider in ("srpo_kernels", "trl"):
            for quantity in ("loss", "grad_hidden", "grad_weight"):
                assert float(cells[provider, f"{quantity}_error"]["median"]) < 1e-4
    assert {row["threads"] for row in rows} == {threads}
    assert {row["torch"] for row in rows} == {torch.__version__}
    assert str(tmp_path) not in out.read_text()


def test_help_names_the_sub_commands(run: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run("--help")
    printed = capsys.readouterr().out
    assert "speed" in printed
    assert "peak" in printed


def test_providers_that_disagree_are_not_timed() -> None:
    def step(value: float) -> Callable[[], tuple[torch.Tensor, ...]]:
        return lambda: (torch.full((3,), value),) * 3

    assert compare({"naive": step(1.0), "trl": step(1.0 + 1e-6)})["trl"].loss < 1e-5
    with pytest.raises(RuntimeError, match="trl does not compute the same"):
        compare({"naive": step(1.0), "trl": step(1.1)})
    with pytest.raises(RuntimeError, match="srpo_kernels does not compute the same"):
        compare({"srpo_kernels": step(float("nan")), "naive": step(1.0)})


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the resident set is read from /proc")
def test_peak_memory_counts_what_a_step_holds() -> None:
    case = Case("smollm2-135m", "policy", 32)
    peak = measure_peak(case, "bare", threads=1)
    logits_and_dw = 4 * 49_152 * (32 + 576)
    assert peak is not None
    # The kernel counts pages per thread and adds them up late.
    assert 0.95 * logits_and_dw <= peak <= 1.3 * logits_and_dw


def test_the_routed_batch_has_the_advertised_shares() -> None:
    batch = make_batch(ROUTED)
    sequences = len(batch.mask)
    policy_sequences = sequences - int(batch.sdpo_mask.sum())
    silent = batch.advantages == 0
    assert 1 - batch.mask.float().mean().item() == pytest.approx(0.35, abs=0.005)
    assert batch.sdpo_mask.sum().item() / sequences == pytest.approx(0.4, abs=0.5 / sequences)
    assert silent.sum().item() / policy_sequences == pytest.approx(0.3, abs=0.5 / policy_sequences)
    assert not (silent & batch.sdpo_mask).any()
    # Lengths do not favour a branch, so tokens have the shares of sequences.
    assert batch.sdpo_rows.float().mean().item() == pytest.approx(0.65 * 0.4, abs=0.02)
    assert batch.active_policy_rows.float().mean().item() == pytest.approx(0.65 * 0.6 * 0.7, abs=0.02)


def test_the_other_workloads_have_one_kind_of_row() -> None:
    policy, distillation = (make_batch(Case("tiny", workload, 64)) for workload in ("policy", "distillation"))
    assert policy.active_policy_rows.all()
    assert distillation.sdpo_rows.all()


def test_a_batch_is_reproducible() -> None:
    first, second = make_batch(ROUTED), make_batch(ROUTED)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.old_log_probs, second.old_log_probs)


@pytest.mark.parametrize("rows", [0, 33, -32])
def test_rows_must_fill_the_sequences(rows: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 32 sequences, got {rows}"):
        make_batch(Case("tiny", "policy", rows))


def test_a_step_leaves_no_gradient_behind() -> None:
    batch = make_batch(Case("tiny", "routed", 128))
    prepare("srpo_kernels", batch)()
    assert batch.hidden.grad is None
    assert batch.weight.grad is None
