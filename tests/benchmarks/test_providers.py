"""Providers on a tiny head: what each computes is compared, and what it cannot do is said."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="a command prints with rich: the extras verify and bench have it")

from benchmarks.memory import measure_peak
from benchmarks.processes import in_fresh_process
from srpo_kernels.verify.agreement import compare
from srpo_kernels.verify.batches import Case, make_batch
from srpo_kernels.verify.providers import Result, Unsupported, cross_entropies, naive, prepare


def test_providers_that_disagree_are_not_timed() -> None:
    batch = make_batch(Case("tiny", "policy", 32))
    truth = prepare("naive", batch)()

    def step(factor: float) -> Callable[[], Result]:
        return lambda: truth._replace(grad_weight=truth.grad_weight * factor)

    assert compare({"naive": step(1.0), "trl": step(1.0 + 1e-5)}, batch, 1e-3)["trl"].grad_weight < 1e-4
    with pytest.raises(RuntimeError, match="trl does not compute the same"):
        compare({"naive": step(1.0), "trl": step(1.1)}, batch, 1e-3)
    with pytest.raises(RuntimeError, match="srpo_kernels does not compute the same"):
        compare({"srpo_kernels": step(float("nan")), "naive": step(1.0)}, batch, 1e-3)


def test_a_provider_without_weights_is_held_to_the_loss_without_them() -> None:
    batch = make_batch(Case("tiny", "jsd", 64))
    plain = prepare("naive", batch.unweighted())
    assert compare({"liger": plain}, batch, 1e-6)["liger"].loss == 0.0
    with pytest.raises(RuntimeError, match="trl does not compute the same"):
        compare({"trl": plain}, batch, 1e-3)


def test_what_a_provider_cannot_do_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    capped = make_batch(Case("tiny", "policy", 32, softcap=30.0))
    with pytest.raises(Unsupported, match="no softcap"):
        cross_entropies.prepare(lambda hidden, weight, ids: hidden, capped)
    batch = make_batch(Case("tiny", "policy", 32))
    for name in ("srpo_kernels-triton", "flash-attn", "quack"):
        with pytest.raises(Unsupported, match="needs a GPU"):
            prepare(name, batch)
    monkeypatch.setitem(sys.modules, "trl.kernels", None)
    monkeypatch.delitem(sys.modules, "srpo_kernels.verify.providers.trl_kernels", raising=False)
    with pytest.raises(Unsupported, match=r"not installed: trl\.kernels"):
        prepare("trl", batch)
    monkeypatch.setattr(naive, "available_bytes", lambda device: 1_000)
    with pytest.raises(Unsupported, match="GiB are free"):
        prepare("naive", batch)


def test_a_step_leaves_no_gradient_behind() -> None:
    batch = make_batch(Case("tiny", "routed", 128))
    prepare("srpo_kernels", batch)()
    assert batch.hidden.grad is None
    assert batch.weight.grad is None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the resident set is read from /proc")
def test_peak_memory_counts_what_a_step_holds() -> None:
    case = Case("smollm2-135m", "policy", 32, vocab_size=40_000)
    peak = in_fresh_process(measure_peak, case, "bare", torch.device("cpu"), 1)
    # Bare products have their logits before the step begins.
    gradients = 4 * 576 * (32 + 40_000)
    assert peak is not None
    # The kernel counts pages per thread and adds them up late.
    assert 0.95 * gradients <= peak <= 1.3 * gradients
