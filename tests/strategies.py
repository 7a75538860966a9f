"""Random calls of the library's functions: options by hypothesis, tensors by seed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srpo_kernels import LogitTransform, RolloutCorrection, SRPOConfig
from srpo_kernels.losses.options import DISTILLATION_MODES, KL_TYPES, LOSS_TYPES, REDUCTIONS
from srpo_kernels.losses.registry import POLICY_LOSSES
from srpo_kernels.rows.spec import DIVERGENCES
from tests.inputs import (
    LEAVES,
    Inputs,
    head_inputs,
    larger_batch,
    loss_inputs,
    policy_rows,
    random_support,
    with_given_topk,
    workspace_floor,
)

# Calls have many options, and are quick.
_THOROUGH = 8 * settings().max_examples
thorough = settings(max_examples=_THOROUGH)

each_backend = pytest.mark.parametrize("backend", ["torch", "triton"])


def shapes(backend: str) -> tuple[tuple[int, ...], ...]:
    """Padded rows and packed ones; a few padded ones for Triton, whose interpreter takes 10 ms a row."""
    return ((5, 6), (23,)) if backend == "torch" else ((4, 3),)


def given_each_backend(*, thorough: bool = False, **strategies: st.SearchStrategy[Any]) -> Callable[..., Any]:
    """``given``, for a property of every ``backend``."""
    most = _THOROUGH if thorough else settings().max_examples
    examples = {"torch": most, "triton": max(5, most // 25)}

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        runs = {backend: settings(max_examples=n)(given(**strategies)(test)) for backend, n in examples.items()}

        def run(backend: str, **fixtures: Any) -> None:
            runs[backend](backend=backend, **fixtures)

        run.__name__, run.__module__, run.__doc__ = test.__name__, test.__module__, test.__doc__
        run.__signature__ = inspect.signature(runs["torch"])
        return each_backend(run)

    return decorate


@dataclass(frozen=True)
class Case:
    """One call: tensor arguments in fp64, options, and the leaves whose gradient is wanted."""

    inputs: Inputs
    options: dict[str, Any]
    leaves: tuple[str, ...] = LEAVES
    workspace_bytes: int | None = None


# None, with and without a softcap.
TEACHER_TRANSFORMS = (*[None] * 3, LogitTransform(1.2, 0.8), LogitTransform(0.9, 1.3, 7.0))


# Values of the losses' own options at which each does what its defaults rarely do on a few rows.
LOSS_OPTIONS: dict[str, tuple[dict[str, float], ...]] = {
    "sapo": ({"tau_positive": 2.0, "tau_negative": 0.5},),
    "vespo": ({"k_positive": 1.0, "lambda_positive": 0.5, "k_negative": 0.5, "lambda_negative": 1.0},),
    "dppo_tv": ({"ratio_max": 1.1},),
    "dppo_kl": ({"ratio_max": 1.1},),
    "ipo": ({"threshold": 0.01, "penalty": 0.3},),
    "dro": ({"beta": 2.0},),
    "clip_cov": ({"share": 0.3, "cov_low": 0.01}, {"share": 0.6, "cov_low": -9.0, "cov_high": 9.0}),
    "kl_cov": ({"share": 0.3, "coefficient": 0.5},),
}


# Each rule of a rollout correction, bounds amid the log-ratios that `rollout_inputs` has, beside old log-probs.
CORRECTIONS = (
    RolloutCorrection.tis(1.3),
    RolloutCorrection.mis(1.2, level="sequence"),
    RolloutCorrection.icepop(0.8, 1.4),
    RolloutCorrection(level="geometric", weight_min=0.9, weight_max=None, off_policy_threshold=0.05),
    RolloutCorrection(level=None, masks={"seq_mean_k1": (-0.2, 0.1), "token_k2": 0.3}),
    RolloutCorrection(level=None, masks={"seq_max_k3": 0.7, "seq_mean_k3": 0.2}, outside="zero"),
    RolloutCorrection(masks={"token_k1": (None, 0.5), "seq_sum_k1": (-0.9, 0.9), "seq_max_k1": 1.1}),
    RolloutCorrection(level="sequence", weight_max=3.0, masks={"token_k3": 0.2, "seq_sum_k2": 0.6, "seq_max_k2": 0.5}),
    RolloutCorrection(level="token", masks={"seq_mean_k2": 0.2, "seq_sum_k3": 0.8}, off_policy_threshold=0.0),
)


def random_loss_options(loss_type: str) -> tuple[dict[str, float], ...]:
    """Options of the loss's own for a batch about which nothing is known."""
    if POLICY_LOSSES[loss_type].whole_batch:
        # Which tokens a smaller share takes is chance where covariances are equal: of two rows they always are.
        return tuple({**options, "share": 1.0} for options in LOSS_OPTIONS[loss_type])
    return ({}, *LOSS_OPTIONS.get(loss_type, ()))


@st.composite
def configs(draw: st.DrawFn, *, whole_batch: bool = True) -> SRPOConfig:
    """Any combination of options that does not contradict itself; ``whole_batch``: losses of a whole batch too."""

    def one_of(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    loss_type = one_of(*(name for name in LOSS_TYPES if whole_batch or not POLICY_LOSSES[name].whole_batch))
    reduction = one_of(*REDUCTIONS)
    clipped = "delta" in POLICY_LOSSES[loss_type].fields
    return SRPOConfig(
        loss_type=loss_type,
        loss_options=one_of(*random_loss_options(loss_type)),
        epsilon_low=one_of(0.2, 0.0, 0.6),
        epsilon_high=one_of(0.28, 0.05),
        delta=one_of(None, 1.5, 1.1) if clipped else None,
        dual_clip=one_of(None, 1.2) if clipped else None,
        log_ratio_clamp=one_of(20.0, 0.3, None),
        kl_coef=one_of(0.0, 0.1),
        kl_type=one_of(*KL_TYPES),
        entropy_coef=one_of(0.0, 0.1, -0.1),
        divergence=one_of(*DIVERGENCES),
        alpha=one_of(0.5, 0.1, 0.9),
        distillation_mode=one_of(*DISTILLATION_MODES),
        topk=one_of(100, 1, 3),
        topk_of=one_of("student", "teacher"),
        add_tail=one_of(True, False),
        distillation_is_clip=one_of(2.0, 1.1, None),
        dw_beta=one_of(1.0, 0.0, 8.0, 30.0),
        temperature=one_of(1.0, 0.7),
        logit_scale=one_of(1.0, 0.5),
        softcap=one_of(None, 5.0),
        teacher_transform=one_of(*TEACHER_TRANSFORMS),
        reduction=reduction,
        max_length=9 if reduction == "constant" else None,
        count_inactive=one_of(False, True),
        count_entropy=one_of(False, True),
        rollout_correction=one_of(*[None] * len(CORRECTIONS), *CORRECTIONS),
    )


ROWS = ((2, 7), (1, 1), (5, 3), (3, 1), (1, 7), (17,), (5,), (1,))
VOCABULARIES = (7, 1, 2, 129, 1000, 1009)


@st.composite
def loss_cases(draw: st.DrawFn, vocabularies: tuple[int, ...] = VOCABULARIES) -> Case:
    """A call of ``srpo_loss`` in any form that it accepts."""
    config = draw(configs())
    rows, vocab_size = draw(st.sampled_from(ROWS)), draw(st.sampled_from(vocabularies))
    teacher_size = draw(st.sampled_from([None, 5]))
    seed = draw(st.integers(0, 2**31))
    hidden_size, spread = draw(st.sampled_from([4, 1, 16])), draw(st.sampled_from([1.0, 4.0]))
    inputs = loss_inputs(seed, rows, hidden_size, vocab_size, teacher_size, spread, config)

    generator = torch.Generator().manual_seed(seed + 2)
    valid = draw(st.sampled_from([0.8, 0.3, 0.0, None]))
    inputs["mask"] = None if valid is None else torch.rand(rows, generator=generator) < valid
    if draw(st.booleans()):
        inputs["sdpo_mask"] = torch.rand(rows, generator=generator) < 0.5
    if draw(st.booleans()):
        inputs["advantages"] = torch.randn(rows, generator=generator, dtype=torch.float64)
        inputs["advantages"] *= torch.rand(rows, generator=generator) < 0.6
    for name in ("bias", "teacher_bias", "old_log_probs", "is_weights"):
        if draw(st.booleans()):
            inputs[name] = None
    if config.rollout_correction is not None and config.rollout_correction.by_sequence:
        inputs["old_log_probs"] = inputs["ref_log_probs"]
    if config.kl_coef == 0 and draw(st.booleans()):
        inputs["ref_log_probs"] = None
    if draw(st.booleans()):
        inputs["normalizers"] = larger_batch(inputs, config)
    if draw(st.booleans()):
        routed = inputs["sdpo_mask"]
        first = routed if routed.shape == rows[:1] else routed.any(1)
        inputs["teacher_hidden"] = inputs["teacher_hidden"][first]
    if not draw(st.integers(0, 3)):
        inputs |= dict.fromkeys(("sdpo_mask", "teacher_hidden", "teacher_weight", "teacher_bias"))
    by_teacher = config.distillation_mode == "topk" and config.topk_of == "teacher"
    if by_teacher and inputs["teacher_hidden"] is not None and draw(st.booleans()):
        inputs = with_given_topk(inputs, config, draw(st.sampled_from([1, 3, 200])))
    if not policy_rows(inputs).any() and draw(st.booleans()):
        inputs["advantages"] = None
    if not draw(st.integers(0, 3)):
        inputs["support_ids"] = random_support(inputs["target_ids"], vocab_size, draw(st.sampled_from([1, 3, 200])))
    models = 1 if inputs["sdpo_mask"] is None else 2
    return Case(
        inputs,
        {"config": config},
        draw(st.sampled_from([LEAVES, ("hidden", "bias"), ("weight",), ("bias",), ()])),
        draw(workspaces(vocab_size, models)),
    )


def workspaces(vocab_size: int, models: int = 2) -> st.SearchStrategy[int | None]:
    """None, or as many bytes as make chunks of a few fp64 rows."""
    floor = workspace_floor(vocab_size, 8, models)
    return st.sampled_from([None, floor, 2 * floor, 3 * floor])


@st.composite
def stats_cases(draw: st.DrawFn, vocabularies: tuple[int, ...] = VOCABULARIES) -> Case:
    """A call of ``token_stats`` in any form that it accepts."""
    rows = draw(st.sampled_from([(2, 7), (1, 1), (17,), (1,), (2, 3, 2)]))
    vocab_size = draw(st.sampled_from(vocabularies))
    inputs = head_inputs(
        draw(st.integers(0, 2**31)),
        rows,
        draw(st.sampled_from([4, 1, 16])),
        vocab_size,
        draw(st.sampled_from([None, 5])),
        draw(st.sampled_from([1.0, 4.0])),
    )
    for name in ("mask", "bias", "teacher_bias"):
        if draw(st.booleans()):
            inputs[name] = None
    if not draw(st.integers(0, 3)):
        inputs |= dict.fromkeys(("teacher_hidden", "teacher_weight", "teacher_bias"))
    options = {
        "divergence": draw(st.sampled_from(DIVERGENCES)),
        "alpha": draw(st.sampled_from([0.5, 0.1, 0.9])),
        "temperature": draw(st.sampled_from([1.0, 0.7])),
        "logit_scale": draw(st.sampled_from([1.0, 0.5])),
        "softcap": draw(st.sampled_from([None, 5.0])),
        "teacher_transform": draw(st.sampled_from(TEACHER_TRANSFORMS)),
    }
    if inputs["teacher_hidden"] is not None and not draw(st.integers(0, 3)):
        config = SRPOConfig(**{name: options[name] for name in ("temperature", "logit_scale", "softcap")})
        inputs = with_given_topk(inputs, config, draw(st.sampled_from([1, 3, 200])))
    if not draw(st.integers(0, 3)):
        inputs["support_ids"] = random_support(inputs["target_ids"], vocab_size, draw(st.sampled_from([1, 3, 200])))
    leaves = draw(st.sampled_from([LEAVES, ("hidden", "bias"), ("weight",), ()]))
    return Case(inputs, options, leaves, draw(workspaces(vocab_size)))
