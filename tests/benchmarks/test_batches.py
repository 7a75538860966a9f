"""The batches that are measured: published cases, and the shares of a routed batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("tyro", reason="a command reads its options with tyro: the extras verify and bench have it")
pytest.importorskip("rich", reason="a command prints with rich: the extras verify and bench have it")

from benchmarks.speed import published
from srpo_kernels.verify.batches import DTYPES, Case, make_batch
from srpo_kernels.verify.kinds import DEFAULT_ACTIVE

ROUTED = Case("tiny", "routed", 1_024)
CPU = torch.device("cpu")


def test_every_published_case_can_be_made() -> None:
    cases = published(CPU)
    assert len(set(cases)) == len(cases)
    for case in cases:
        small = replace(case, head="tiny", rows=32, vocab_size=None)
        batch = make_batch(small)
        assert batch.hidden.dtype == DTYPES[case.dtype]
        assert batch.config.softcap == case.softcap
    assert {case.head for case in cases} == {"smollm2-135m", "qwen3-0.6b", "gemma-3-1b", "llama-3-8b", "qwen3-8b"}


@pytest.mark.parametrize("active", [0.1, 0.25, DEFAULT_ACTIVE, 0.82])
def test_a_routed_batch_has_the_share_of_active_rows_that_was_asked_for(active: float) -> None:
    batch = make_batch(Case("tiny", "routed", 4_096, active=active))
    rows = batch.sdpo_rows | batch.active_policy_rows
    assert rows.float().mean().item() == pytest.approx(active, abs=0.02)


def test_more_active_rows_than_a_routed_batch_can_have_are_refused() -> None:
    with pytest.raises(ValueError, match=r"active must lie in \(0, 0\.82\] for a routed batch, got 0\.9"):
        make_batch(Case("tiny", "routed", 64, active=0.9))


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
    policy, distillation = (make_batch(Case("tiny", workload, 64)) for workload in ("policy", "jsd"))
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
