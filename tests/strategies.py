"""Random calls of the library's functions: tensors by seed, options by hypothesis."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from srpo_kernels import LogitTransform, Normalizers, RolloutCorrection, SRPOConfig
from srpo_kernels.engine.backends import rows_of
from srpo_kernels.engine.plan import RowMemory
from srpo_kernels.losses.options import DISTILLATION_MODES, KL_TYPES, LOSS_TYPES, REDUCTIONS
from srpo_kernels.losses.registry import POLICY_LOSSES
from srpo_kernels.rows.spec import DIVERGENCES

LEAVES = ("hidden", "weight", "bias")
SHARED = ("weight", "bias", "teacher_weight", "teacher_bias")
MODEL_TENSORS = ("hidden", "teacher_hidden", *SHARED)

# Calls have many options, and are quick.
_THOROUGH = 8 * settings().max_examples
thorough = settings(max_examples=_THOROUGH)

Inputs = dict[str, Any]

# On a GPU `verify` holds the compiled kernels to the same.
_interpreted = pytest.mark.skipif(
    torch.accelerator.is_available(),
    reason="no interpreter: verify covers GPUs",
)
each_backend = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=_interpreted)])


def given_each_backend(*, thorough: bool = False, **strategies: st.SearchStrategy[Any]) -> Callable[..., Any]:
    """``given``, for a property of every ``backend``."""
    most = _THOROUGH if thorough else settings().max_examples
    # A row takes Triton's interpreter 10 ms.
    examples = {"torch": most, "triton": max(5, most // 10)}

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


def transform_of(config: SRPOConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("temperature", "logit_scale", "softcap")}


def teacher_transform_of(config: SRPOConfig) -> dict[str, Any]:
    """The teacher's own, or the student's."""
    return transform_of(config) if config.teacher_transform is None else config.teacher_transform._asdict()


# None, with and without a softcap.
TEACHER_TRANSFORMS = (*[None] * 3, LogitTransform(1.2, 0.8), LogitTransform(0.9, 1.3, 7.0))


def head_inputs(
    seed: int,
    rows: tuple[int, ...],
    hidden_size: int,
    vocab_size: int,
    teacher_size: int | None = None,
    spread: float = 1.0,
) -> Inputs:
    """Student and teacher in fp64, with logits of standard deviation ``spread``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    width = hidden_size if teacher_size is None else teacher_size
    return {
        "hidden": normal(*rows, hidden_size) * spread / math.sqrt(hidden_size),
        "weight": normal(vocab_size, hidden_size),
        "target_ids": torch.randint(0, vocab_size, rows, generator=generator),
        "bias": normal(vocab_size),
        "mask": torch.rand(rows, generator=generator) < 0.8,
        "teacher_hidden": normal(*rows, width) * spread / math.sqrt(width),
        "teacher_weight": None if teacher_size is None else normal(vocab_size, width),
        "teacher_bias": None if teacher_size is None else normal(vocab_size),
    }


def loss_inputs(
    seed: int = 0,
    rows: tuple[int, ...] = (4, 6),
    hidden_size: int = 8,
    vocab_size: int = 33,
    teacher_size: int | None = None,
    spread: float = 1.0,
    config: SRPOConfig | None = None,
) -> Inputs:
    """Every tensor argument of ``srpo_loss`` in fp64, old and reference log-probs near the student's.

    Packed rows ``[N]`` get unsorted, interleaved sequence ids; routes and advantages are per first dimension.
    """
    inputs = head_inputs(seed, rows, hidden_size, vocab_size, teacher_size, spread)
    student = {name: inputs[name] for name in ("hidden", "weight", "target_ids", "bias")}
    transform = transform_of(SRPOConfig() if config is None else config)
    log_probs = reference.token_stats(**student, **transform).log_probs
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if len(rows) == 1:
        names = torch.tensor([7, -3, 2**40, 0, 11])
        inputs["sequence_ids"] = names[torch.randint(0, len(names), rows, generator=generator)]
    return (
        inputs
        | {
            "advantages": normal(rows[0]) * (torch.rand(rows[0], generator=generator) < 0.7),
            "sdpo_mask": torch.rand(rows[0], generator=generator) < 0.5,
            "old_log_probs": log_probs + 0.4 * normal(*rows),
            "ref_log_probs": log_probs + 0.4 * normal(*rows),
            "is_weights": 2 * torch.rand(rows, generator=generator, dtype=torch.float64),
        }
        | rollout_inputs(config, log_probs, generator)
    )


def rollout_inputs(config: SRPOConfig | None, log_probs: Tensor, generator: torch.Generator) -> Inputs:
    """What a rollout correction takes: the rollout engine's log-probs, some of them not known."""
    if config is None or config.rollout_correction is None:
        return {}
    noise = torch.randn(log_probs.shape, generator=generator, dtype=torch.float64)
    unknown = torch.rand(log_probs.shape, generator=generator) < 0.1
    return {"rollout_log_probs": (log_probs + 0.3 * noise).masked_fill(unknown, math.nan)}


def take(inputs: Inputs, index: Tensor) -> Inputs:
    """Some entries of the first dimension, in the order of ``index``."""
    return {name: x if x is None or name in SHARED else x[index] for name, x in inputs.items()}


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The model's tensors in ``dtype``, what the caller says of each row in fp32 or, for fp64, in fp64."""
    row_dtype = torch.promote_types(dtype, torch.float32)

    def convert(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.to(dtype if name in MODEL_TENSORS else row_dtype)

    return {name: convert(name, value) for name, value in inputs.items()}


def for_backend(inputs: Inputs, backend: str) -> Inputs:
    """The inputs in the widest dtype that the backend computes in."""
    return cast(inputs, torch.float32) if backend == "triton" else inputs


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
        rollout_correction=one_of(*[None] * len(CORRECTIONS), *CORRECTIONS),
    )


ROWS = ((2, 7), (1, 1), (5, 3), (3, 1), (1, 7), (17,), (5,), (1,))


@st.composite
def loss_cases(draw: st.DrawFn) -> Case:
    """A call of ``srpo_loss`` in any form that it accepts."""
    config = draw(configs())
    rows, vocab_size = draw(st.sampled_from(ROWS)), draw(st.sampled_from([7, 1, 2, 129, 1000, 1009]))
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


def with_given_topk(inputs: Inputs, config: SRPOConfig, k: int, *, fewer: bool = True) -> Inputs:
    """The teacher's likeliest tokens in place of its hidden states, ``fewer`` of them in some rows."""
    own = inputs["teacher_weight"] is not None
    head = [inputs[name] for name in (("teacher_weight", "teacher_bias") if own else ("weight", "bias"))]
    logits = reference.logits.head_logits(inputs["teacher_hidden"], *head, **teacher_transform_of(config))
    log_probs, ids = logits.log_softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
    if fewer:
        absent = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.1
        ids, log_probs = ids.masked_fill(absent, -1), log_probs.masked_fill(absent, -math.inf)
    given = {"teacher_topk_ids": ids, "teacher_topk_log_probs": log_probs}
    return inputs | dict.fromkeys(("teacher_hidden", "teacher_weight", "teacher_bias")) | given


def random_support(target_ids: Tensor, vocab_size: int, k: int, seed: int = 0) -> Tensor:
    """Distinct ids of each row, fewer in some; most have the row's own."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(*target_ids.shape, vocab_size, generator=generator)
    scores.scatter_(-1, target_ids[..., None], 0.8)
    ids = scores.topk(min(k, vocab_size), dim=-1).indices
    return ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.1, -1)


def larger_batch(inputs: Inputs, config: SRPOConfig) -> Normalizers:
    """Normalizers of a batch that has more than these rows, and teachers that are a little less certain."""
    own_head = inputs["teacher_weight"] is not None
    teacher = {
        "hidden": inputs["teacher_hidden"],
        "weight": inputs["teacher_weight" if own_head else "weight"],
        "bias": inputs["teacher_bias" if own_head else "bias"],
    }
    transform = teacher_transform_of(config)
    entropy = reference.token_stats(**teacher, target_ids=inputs["target_ids"], **transform).entropy
    log_mean = reference.distillation.weight_log_mean(entropy.flatten(), config.dw_beta) - 0.1 * config.dw_beta
    return Normalizers(torch.tensor(40), log_mean, torch.tensor(35), torch.tensor(18))


def policy_rows(inputs: Inputs) -> Tensor:
    """The valid rows of the policy branch, in the shape of ``target_ids``."""
    mask, routed = inputs["mask"], inputs["sdpo_mask"]
    valid = torch.ones_like(inputs["target_ids"], dtype=torch.bool) if mask is None else mask
    if routed is None:
        return valid
    return valid & ~(routed if routed.shape == valid.shape else routed[:, None])


def workspace_floor(vocab_size: int, itemsize: int, models: int, backend: str = "torch") -> int:
    """Bytes of the smallest workspace that a backend accepts on a CPU."""
    cpu = torch.device("cpu")
    return RowMemory(vocab_size, itemsize, rows_of(backend).scratch(vocab_size, cpu), cpu).floor(models)


def workspaces(vocab_size: int, models: int = 2) -> st.SearchStrategy[int | None]:
    """None, or as many bytes as make chunks of a few fp64 rows."""
    floor = workspace_floor(vocab_size, 8, models)
    return st.sampled_from([None, floor, 2 * floor, 3 * floor])


@st.composite
def stats_cases(draw: st.DrawFn) -> Case:
    """A call of ``token_stats`` in any form that it accepts."""
    rows = draw(st.sampled_from([(2, 7), (1, 1), (17,), (1,), (2, 3, 2)]))
    vocab_size = draw(st.sampled_from([7, 1, 2, 129, 1000, 1009]))
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
