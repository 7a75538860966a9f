"""A case from one integer: the operation, its options and its tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import reference
from srpo_kernels import SRPOConfig
from srpo_kernels.losses.options import DISTILLATION_MODES, KL_TYPES, LOSS_TYPES, REDUCTIONS
from srpo_kernels.losses.registry import POLICY_LOSSES
from srpo_kernels.rows.contract import DIVERGENCES
from srpo_kernels.rows.mixture import has_mixture
from tests.fuzz.case import Case, Draw
from tests.fuzz.models import Inputs, ModelShape, draw_model, to_dtypes
from tests.fuzz.own import CLIPS, own_numbers
from tests.strategies import (
    CORRECTIONS,
    MODEL_TENSORS,
    random_loss_options,
    random_support,
    transform_of,
    with_given_topk,
    workspace_floor,
)

# How often each operation is drawn.
_OPERATIONS = {
    "srpo_loss": 55,
    "token_stats": 22,
    "teacher_stats": 5,
    "policy_loss": 8,
    "sampled_distillation_loss": 4,
    "normalizers": 3,
    "routing": 3,
}
_SEQUENCE_NAMES = torch.tensor([7, -3, 2**40, 0, 11])
# exp of more nats than this is beyond fp64: the oracle could not say what is right.
_MOST_NATS = 600.0


def draw_case(seed: int, backend: str) -> Case:
    """The case of an integer."""
    draw = Draw(seed)
    names = list(_OPERATIONS)
    operation = draw.random.choices(names, [_OPERATIONS[name] for name in names])[0]
    makers: dict[str, Callable[[Draw, int, str], Case]] = {
        "srpo_loss": _loss_case,
        "token_stats": _stats_case,
        "teacher_stats": _stats_case,
        "policy_loss": _token_loss_case,
        "sampled_distillation_loss": _token_loss_case,
        "normalizers": _normalizers_case,
        "routing": _routing_case,
    }
    draw.options["operation"] = operation
    return makers[operation](draw, seed, backend)


def draw_config(draw: Draw) -> SRPOConfig:
    """Any combination of options that does not contradict itself."""
    one_of = draw.one_of
    loss_type, reduction = one_of("loss_type", *LOSS_TYPES), one_of("reduction", *REDUCTIONS)
    clipped = "delta" in POLICY_LOSSES[loss_type].fields
    divergence = one_of("divergence", *DIVERGENCES)
    mode = one_of("distillation_mode", "full", *DISTILLATION_MODES)
    # No two clips meet at one ratio: there the derivative is either side's.
    return SRPOConfig(
        loss_type=loss_type,
        loss_options=one_of("loss_options", *random_loss_options(loss_type)),
        epsilon_low=one_of("epsilon_low", 0.2, 3e-4, 0.6),
        epsilon_high=one_of("epsilon_high", 0.28, 4e-4, 0.07),
        delta=one_of("delta", None, 1.4, 1.1, 4.0) if clipped else None,
        dual_clip=one_of("dual_clip", None, 1.25, 3.0) if clipped else None,
        log_ratio_clamp=one_of("log_ratio_clamp", 20.0, 20.0, 0.3, 5.0, None),
        kl_coef=one_of("kl_coef", 0.0, 0.0, 1e-3, 0.1),
        kl_type=one_of("kl_type", *KL_TYPES),
        entropy_coef=one_of("entropy_coef", 0.0, 0.0, 0.01, -0.1),
        divergence=divergence,
        alpha=one_of("alpha", 0.5, 0.5, 0.1, 0.9, 1e-3, 0.999, 1e-6, 1 - 1e-6),
        divergence_clip=None if mode == "sampled" else one_of("divergence_clip", None, None, None, *CLIPS),
        distillation_mode=mode,
        topk=one_of("topk", 1, 2, 5, 20, 100, 1000),
        topk_of=one_of("topk_of", "student", "teacher"),
        add_tail=one_of("add_tail", True, False),
        distillation_is_clip=one_of("distillation_is_clip", 2.0, 1.1, 50.0, None),
        dw_beta=one_of("dw_beta", 1.0, 0.0, 0.3, 2.0, 5.0, 20.0),
        temperature=one_of("temperature", 1.0, 1.0, 0.7, 0.05, 3.0),
        logit_scale=one_of("logit_scale", 1.0, 1.0, 0.5, 4.0),
        softcap=one_of("softcap", None, None, 5.0, 30.0, 1e6),
        reduction=reduction,
        max_length=9 if reduction == "constant" else None,
        count_inactive=one_of("count_inactive", False, True),
        rollout_correction=one_of("rollout_correction", *[None] * 2 * len(CORRECTIONS), *CORRECTIONS),
    )


def _rows(draw: Draw, backend: str) -> tuple[int, ...]:
    most = 10 if backend == "triton" else 20
    if draw.one_of("packed", False, True):
        return (draw.random.randint(1, most),)
    sequences = draw.random.randint(1, 4)
    return (sequences, draw.random.randint(1, max(1, most // sequences)))


def _mask(draw: Draw, rows: tuple[int, ...]) -> Tensor | None:
    kind = draw.one_of("mask", None, 0.8, 0.8, 0.8, 0.3, 0.0)
    if kind is None:
        return None
    mask = draw.uniform(*rows) < kind
    if len(rows) == 2 and draw.one_of("empty_sequence", False, False, True):
        mask[0] = False
    return mask


def _model(draw: Draw, backend: str, config: SRPOConfig, rows: tuple[int, ...], **limits: Any) -> ModelShape:
    return draw_model(draw, rows, config, widest=torch.float32 if backend == "triton" else torch.float64, **limits)


def _call(draw: Draw, backend: str, vocab_size: int, models: int, dtype: torch.dtype) -> dict[str, Any]:
    """What the library alone is told."""
    times = draw.one_of("workspace", None, None, 1, 2, 5)
    floor = workspace_floor(vocab_size, dtype.itemsize, models, backend)
    return {"backend": backend, "workspace_bytes": None if times is None else times * floor}


def _loss_case(draw: Draw, seed: int, backend: str) -> Case:
    config, rows = draw_config(draw), _rows(draw, backend)
    distills = draw.one_of("distills", True, True, True, False)
    model = _model(draw, backend, config, rows, mode=config.distillation_mode if distills else None)
    # `draw_model` may have had to leave top-k ties alone.
    config = model.config
    inputs = model.inputs | _loss_rows(draw, model, rows, config)
    if not distills:
        inputs |= dict.fromkeys(("sdpo_mask", "teacher_hidden", "teacher_weight", "teacher_bias"))
    inputs["mask"] = _mask(draw, rows)
    if draw.one_of("poison", False, True) and inputs["mask"] is not None:
        inputs |= _poisoned(draw, inputs)
    if distills and draw.one_of("routed_teacher", False, True):
        routed = inputs["sdpo_mask"]
        inputs["teacher_hidden"] = inputs["teacher_hidden"][routed if routed.ndim == 1 else routed.any(1)]
    by_teacher = distills and config.distillation_mode == "topk" and config.topk_of == "teacher"
    if by_teacher and draw.one_of("given", False, True):
        given = with_given_topk(to_dtypes(inputs, dict.fromkeys(MODEL_TENSORS, torch.float64)), config, config.topk)
        row_dtype = torch.promote_types(model.accumulation_dtype, torch.float32)
        given["teacher_topk_log_probs"] = given["teacher_topk_log_probs"].to(row_dtype)
        inputs |= {name: value for name, value in given.items() if name.startswith("teacher_")}
    if distills:
        inputs |= own_numbers(draw, config, rows, torch.promote_types(model.accumulation_dtype, torch.float32))
    support = draw.one_of("support", None, None, None, 1, 5, 1000)
    if support is not None:
        allowed = inputs["target_ids"].clamp(0, model.vocab_size - 1)
        inputs["support_ids"] = random_support(allowed, model.vocab_size, support, seed)
    other = None
    kind = draw.one_of("normalizers", None, None, "own", "merged")
    if kind is not None:
        other = (0, 0.0, 0, 0)
    if kind == "merged":
        other = (draw.random.randint(1, 50), -config.dw_beta * draw.random.uniform(0.2, 2.0), 18, 5)
    leaves = draw.one_of("leaves", *[("hidden", "weight", "bias")] * 4, ("hidden",), ("weight", "bias"), ())
    keywords = _call(draw, backend, model.vocab_size, 2 if distills else 1, model.accumulation_dtype)
    return Case(
        seed, "srpo_loss", draw.options, inputs, config, leaves,
        torch.tensor(draw.one_of("upstream", 1.0, 0.37, -2.5)), model.exact_products, other, keywords,
        draw.one_of("lanes", 16, 64, 1024),
    )  # fmt: skip


def _loss_rows(draw: Draw, model: ModelShape, rows: tuple[int, ...], config: SRPOConfig) -> Inputs:
    """What ``srpo_loss`` wants to know of each row."""
    wide = to_dtypes(model.inputs, dict.fromkeys(MODEL_TENSORS, torch.float64))
    student = {name: wide[name] for name in ("hidden", "weight", "target_ids", "bias")}
    log_probs = reference.token_stats(**student, **transform_of(config)).log_probs
    row_dtype = torch.promote_types(model.accumulation_dtype, torch.float32)
    per_token = draw.one_of("advantages", "[B]", "[B, T]")
    shape = rows if per_token == "[B, T]" else rows[:1]
    zeros = draw.one_of("zero_advantages", 0.3, 0.3, 0.0, 1.0)
    advantages = draw.normal(*shape) * (draw.uniform(*shape) >= zeros)
    inputs: Inputs = {
        "advantages": advantages.to(row_dtype),
        "old_log_probs": _distant(draw, "old_log_probs", log_probs, config.log_ratio_clamp is None, row_dtype),
        "ref_log_probs": _distant(draw, "ref_log_probs", log_probs, "k3" in config.kl_type, row_dtype),
    }
    if inputs["ref_log_probs"] is None and config.kl_coef != 0:
        inputs["ref_log_probs"] = log_probs.to(row_dtype)
    inputs |= _rollout_rows(draw, config, log_probs, row_dtype)
    if config.rollout_correction is not None and inputs["old_log_probs"] is None:
        inputs["old_log_probs"] = log_probs.to(row_dtype)
    inputs["is_weights"] = None
    if draw.one_of("is_weights", False, True):
        inputs["is_weights"] = (2 * draw.uniform(*rows) * (draw.uniform(*rows) > 0.2)).to(row_dtype)
    if len(rows) == 1:
        inputs["sequence_ids"] = _SEQUENCE_NAMES[draw.ids(len(_SEQUENCE_NAMES), *rows)]
    routed = rows if draw.one_of("sdpo_mask", "[B]", "[B]", "[B, T]") == "[B, T]" else rows[:1]
    inputs["sdpo_mask"] = draw.uniform(*routed) < draw.one_of("routed", 0.5, 0.5, 1.0, 0.0)
    return inputs


def _rollout_rows(draw: Draw, config: SRPOConfig, log_probs: Tensor, dtype: torch.dtype) -> Inputs:
    """The rollout engine's log-probs, some of them not known, for a correction that takes them."""
    if config.rollout_correction is None:
        return {}
    gap = draw.one_of("rollout_gap", 0.3, 0.3, 0.3, 3.0, 100.0)
    unknown = draw.uniform(*log_probs.shape) < 0.1
    return {
        "rollout_log_probs": (log_probs + gap * draw.normal(*log_probs.shape)).masked_fill(unknown, math.nan).to(dtype)
    }


def _distant(draw: Draw, name: str, log_probs: Tensor, unbounded: bool, dtype: torch.dtype) -> Tensor | None:
    """Log-probs at a distance from these, above or below; away from where a clip of a ratio would begin."""
    gap = draw.one_of(f"{name}_gap", None, 0.0, 0.4, 0.4, 1.0, 30.0, 100.0, 1000.0)
    if gap is None:
        return None
    gap = min(gap, _MOST_NATS) if unbounded else gap
    signs = torch.where(draw.uniform(*log_probs.shape) < 0.5, -1.0, 1.0)
    away = signs * gap + (0.05 if gap else 0.0) * draw.normal(*log_probs.shape)
    if not gap and draw.options["loss_type"] == "kl_cov":
        # Its gradient jumps where a ratio is 1.
        away = away + 0.01
    return (log_probs + away).to(dtype)


def _poisoned(draw: Draw, inputs: Inputs) -> Inputs:
    """Masked rows that would spoil everything if they were read."""
    masked, bad = ~inputs["mask"], draw.one_of("poison_value", math.nan, math.inf)
    spoilt: Inputs = {"target_ids": inputs["target_ids"].masked_fill(masked, draw.random.choice([-100, 2**40]))}
    for name in (
        "hidden",
        "teacher_hidden",
        "old_log_probs",
        "ref_log_probs",
        "rollout_log_probs",
        "is_weights",
        "advantages",
    ):
        value = inputs.get(name)
        if value is not None and value.shape[: masked.ndim] == masked.shape:
            spoilt[name] = value.clone()
            spoilt[name][masked] = bad
    return spoilt


def _stats_case(draw: Draw, seed: int, backend: str) -> Case:
    operation = draw.options["operation"]
    config, rows = draw_config(draw), _rows(draw, backend)
    teacher = operation == "token_stats" and draw.one_of("teacher_given", True, True, True, False)
    model = _model(draw, backend, config, rows, mode="full" if teacher else None)
    inputs = model.inputs | {"mask": _mask(draw, rows)}
    if draw.one_of("poison", False, True) and inputs["mask"] is not None:
        inputs |= _poisoned(draw, inputs)
    names = ("hidden", "weight", "bias", "target_ids", "mask")
    if teacher:
        names += ("teacher_hidden", "teacher_weight", "teacher_bias")
    inputs = {name: inputs[name] for name in names}
    leaves = () if operation == "teacher_stats" else draw.one_of("leaves", *[("hidden", "weight", "bias")] * 2, ())
    keywords = _call(draw, backend, model.vocab_size, 1 + teacher, model.accumulation_dtype)
    one_dtype = len({x.dtype for name, x in inputs.items() if x is not None and name in MODEL_TENSORS}) == 1
    if backend == "triton" and not leaves and one_dtype and not (teacher and has_mixture(config.divergence)):
        keywords["engine"] = draw.one_of("engine", "rows", "tile")
    upstream = draw.normal(4, *rows) * (draw.uniform(4, *rows) < 0.7)
    return Case(
        seed, operation, draw.options, inputs, config, leaves, upstream,
        model.exact_products, None, keywords, draw.one_of("lanes", 16, 64, 1024),
    )  # fmt: skip


def _token_loss_case(draw: Draw, seed: int, backend: str) -> Case:
    operation, config, rows = draw.options["operation"], draw_config(draw), _rows(draw, "torch")
    if operation == "sampled_distillation_loss":
        config = replace(config, rollout_correction=None)
    dtype = draw.one_of("dtype", torch.float32, torch.float64)
    log_probs = -draw.normal(*rows).abs() * draw.one_of("log_probs", 1.0, 1e-4, 30.0, 1000.0)
    inputs: Inputs = {
        "log_probs": log_probs,
        "old_log_probs": _distant(draw, "old_log_probs", log_probs, config.log_ratio_clamp is None, dtype),
        "is_weights": 2 * draw.uniform(*rows) if draw.one_of("is_weights", False, True) else None,
    }
    if operation == "policy_loss":
        inputs |= _rollout_rows(draw, config, log_probs, dtype)
        if config.rollout_correction is not None and inputs["old_log_probs"] is None:
            inputs["old_log_probs"] = log_probs - 0.2
        inputs |= {
            "advantages": draw.normal(*(rows if draw.one_of("advantages", "[B]", "[B, T]") != "[B]" else rows[:1])),
            "ref_log_probs": _distant(draw, "ref_log_probs", log_probs, "k3" in config.kl_type, dtype),
            "entropy": draw.normal(*rows).abs() if config.entropy_coef else None,
            "sequence_ids": _SEQUENCE_NAMES[draw.ids(len(_SEQUENCE_NAMES), *rows)] if len(rows) == 1 else None,
        }
        if inputs["ref_log_probs"] is None and config.kl_coef != 0:
            inputs["ref_log_probs"] = log_probs + 0.3
    else:
        inputs["teacher_log_probs"] = _distant(draw, "teacher_log_probs", log_probs, False, dtype)
        if inputs["teacher_log_probs"] is None:
            inputs["teacher_log_probs"] = log_probs - 0.3
    inputs = to_dtypes(inputs, dict.fromkeys(inputs, dtype)) | {"mask": _mask(draw, rows)}
    if inputs["mask"] is not None and draw.one_of("poison", False, True):
        masked = ~inputs["mask"]
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape == masked.shape:
                inputs[name] = value.masked_fill(masked, math.nan)
    return Case(seed, operation, draw.options, inputs, config, ("log_probs", "entropy"), draw.normal(*rows))


def _normalizers_case(draw: Draw, seed: int, backend: str) -> Case:
    """``parts`` of a batch, whose normalizers are merged."""
    config, rows = draw_config(draw), (draw.random.randint(1, 8), draw.random.randint(1, 6))
    entropy = draw.uniform(*rows) * draw.one_of("entropy", 1.0, 12.0, 1e-4)
    routed = rows if draw.one_of("sdpo_mask", "[B]", "[B, T]") == "[B, T]" else rows[:1]
    inputs: Inputs = {
        "mask": draw.uniform(*rows) < draw.one_of("mask", 0.8, 0.2, 0.0),
        "sdpo_mask": draw.uniform(*routed) < draw.one_of("routed", 0.5, 1.0, 0.0),
        "teacher_entropy": entropy.to(draw.one_of("dtype", torch.float32, torch.float64, torch.bfloat16)),
        "parts": draw.ids(draw.one_of("num_parts", 1, 2, 4), rows[0]),
    }
    return Case(seed, "normalizers", draw.options, inputs, config)


def _routing_case(draw: Draw, seed: int, backend: str) -> Case:
    count = draw.random.randint(1, 12)
    rewards = {
        "binary": draw.ids(2, count).double(),
        "levels": draw.ids(4, count) / 3,
        "normal": draw.normal(count),
        "equal": torch.full((count,), 0.2, dtype=torch.float64),
    }[draw.one_of("rewards", "binary", "levels", "normal", "equal")]
    inputs: Inputs = {
        "rewards": (rewards * draw.one_of("reward_scale", 1.0, 1e-6, 1e6)).to(
            draw.one_of("dtype", torch.float32, torch.float64, torch.bfloat16)
        ),
        "group_ids": _SEQUENCE_NAMES[draw.ids(3, count)],
        "feedback_available": draw.uniform(count) < 0.3 if draw.one_of("feedback", False, True) else None,
    }
    draw.one_of("scale", "none", "group", "batch")
    draw.one_of("success_threshold", 0.5, 0.0, 1.0)
    return Case(seed, "routing", draw.options, inputs, SRPOConfig())
