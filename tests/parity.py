"""Cases of ``srpo_loss`` and ``token_stats`` in low precision, held to the oracle in fp64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import reference
from srpo_kernels import SRPOConfig, srpo_loss, token_stats
from srpo_kernels.verify.rounding import GradientTerms
from tests.comparison import assert_as_accurate, assert_same, condition_of, run_loss, run_stats
from tests.inputs import LEAVES, Inputs, cast
from tests.strategies import Case

STATS_FIELDS = (
    "divergence", "alpha", "distillation_mode", "topk", "topk_of", "add_tail", "divergence_clip", "temperature",
    "logit_scale", "softcap", "teacher_transform",
)  # fmt: skip


def check_loss(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Loss, log-probs, metrics and gradients are as accurate as those of plain torch with fp32 logits."""
    rounded = cast(case.inputs, dtype)
    actual = run_loss(
        srpo_loss, rounded, case.leaves, workspace_bytes=case.workspace_bytes, backend=backend, **case.options
    )
    naive = run_loss(reference.srpo_loss, rounded, case.leaves, **case.options)
    terms = GradientTerms()
    exact = run_loss(reference.srpo_loss, cast(rounded, torch.float64), case.leaves, project=terms, **case.options)
    assert_as_accurate(
        actual,
        naive,
        exact,
        share=1.0 / len(exact["log_probs"]),
        condition=condition_of(case.options["config"], exact),
        rounding=rounding(terms, rounded),
    )


def check_loss_in(
    inputs: Inputs,
    config: SRPOConfig,
    backend: str,
    leaves: tuple[str, ...] = LEAVES,
    *,
    workspace_bytes: int | None = None,
) -> None:
    """Inputs in fp64: the same as the oracle's in fp64, and in fp32 as accurate as plain torch."""
    if backend == "torch":
        expected = run_loss(reference.srpo_loss, inputs, leaves, config=config)
        actual = run_loss(srpo_loss, inputs, leaves, config=config, backend=backend, workspace_bytes=workspace_bytes)
        assert_same(actual, expected, 1e-9)
    else:
        check_loss(Case(inputs, {"config": config}, leaves, workspace_bytes), torch.float32, backend)


def check_stats_in(inputs: Inputs, backend: str, leaves: tuple[str, ...] = LEAVES, **options: Any) -> None:
    """The same of ``token_stats``; ``config`` may be among the options."""
    case = Case(inputs, options, leaves)
    if backend == "torch":
        upstream = coefficients(inputs)
        expected = run_stats(reference.token_stats, inputs, upstream, leaves, **oracle_options(options))
        assert_same(run_stats(token_stats, inputs, upstream, leaves, **options), expected, 1e-9)
    else:
        check_stats(case, torch.float32, backend)


def oracle_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those of ``token_stats`` as the oracle takes them."""
    config = options.get("config")
    return options if config is None else {name: getattr(config, name) for name in STATS_FIELDS}


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
    options = oracle_options(case.options)
    naive = run_stats(reference.token_stats, rounded, upstream, case.leaves, **options)
    widened = cast(rounded, torch.float64)
    terms = GradientTerms()
    exact = run_stats(reference.token_stats, widened, upstream, case.leaves, project=terms, **options)
    assert_as_accurate(actual, naive, exact, rounding=rounding(terms, rounded))


def rounding(terms: GradientTerms, inputs: Inputs) -> dict[str, float]:
    """What dlogits that are rounded add to gradients where the library's functions run."""
    # Here, since ranks that import this module have yet to ask for the interpreter.
    from tests import devices

    return terms.rounding(inputs["weight"].to(devices.current()))


def coefficients(inputs: Inputs) -> Tensor:
    """Upstream gradients of the four differentiable statistics; about a third of them are 0."""
    shape = (4, *inputs["target_ids"].shape)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values * (torch.rand(shape, generator=generator) < 0.7)
