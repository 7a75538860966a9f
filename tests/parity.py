"""Cases of ``srpo_loss`` and ``token_stats`` in low precision, held to the oracle in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

import reference
from srpo_kernels import srpo_loss, token_stats
from tests.comparison import assert_as_accurate, condition_of, run_loss, run_stats
from tests.strategies import Case, Inputs, cast


def check_loss(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Loss, log-probs, metrics and gradients are as accurate as those of plain torch with fp32 logits."""
    rounded = cast(case.inputs, dtype)
    actual = run_loss(
        srpo_loss, rounded, case.leaves, workspace_bytes=case.workspace_bytes, backend=backend, **case.options
    )
    naive = run_loss(reference.srpo_loss, rounded, case.leaves, **case.options)
    exact = run_loss(reference.srpo_loss, cast(rounded, torch.float64), case.leaves, **case.options)
    condition = condition_of(case.options["config"], exact)
    assert_as_accurate(actual, naive, exact, share=1.0 / len(exact["log_probs"]), condition=condition)


def check_stats(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Statistics and gradients are as accurate as those of plain torch with fp32 logits."""
    rounded, upstream = cast(case.inputs, dtype), coefficients(case.inputs)
    actual = run_stats(
        token_stats,
        rounded,
        upstream,
        case.leaves,
        workspace_bytes=case.workspace_bytes,
        backend=backend,
        **case.options,
    )
    naive = run_stats(reference.token_stats, rounded, upstream, case.leaves, **case.options)
    widened = cast(rounded, torch.float64)
    exact = run_stats(reference.token_stats, widened, upstream, case.leaves, **case.options)
    assert_as_accurate(actual, naive, exact)


def coefficients(inputs: Inputs) -> Tensor:
    """Upstream gradients of the four differentiable statistics; about a third of them are 0."""
    shape = (4, *inputs["target_ids"].shape)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values * (torch.rand(shape, generator=generator) < 0.7)
