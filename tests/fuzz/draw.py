"""A case from one integer: the operation, its options and its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import reference
from srpo_kernels import SRPOConfig
from srpo_kernels.rows.mixture import has_mixture
from tests.fuzz.case import Case, Draw
from tests.fuzz.models import Inputs, ModelShape, draw_model, to_dtypes
from tests.fuzz.options import draw_config
from tests.fuzz.own import own_numbers
from tests.fuzz.rows import SEQUENCE_NAMES, distant, draw_mask, draw_rows, poisoned, rollout_rows
from tests.fuzz.vectors import normalizers_case, routing_case, token_loss_case
from tests.inputs import MODEL_TENSORS, random_support, transform_of, with_given_topk, workspace_floor

# How often each operation is drawn.
_OPERATIONS = {
    "srpo_loss": 50,
    "token_stats": 17,
    "fused_loss": 10,
    "teacher_stats": 5,
    "policy_loss": 8,
    "sampled_distillation_loss": 4,
    "normalizers": 3,
    "routing": 3,
}


def draw_case(seed: int, backend: str) -> Case:
    """The case of an integer."""
    draw = Draw(seed)
    names = list(_OPERATIONS)
    operation = draw.random.choices(names, [_OPERATIONS[name] for name in names])[0]
    makers: dict[str, Callable[[Draw, int, str], Case]] = {
        "srpo_loss": _loss_case,
        "token_stats": _stats_case,
        "fused_loss": _stats_case,
        "teacher_stats": _stats_case,
        "policy_loss": token_loss_case,
        "sampled_distillation_loss": token_loss_case,
        "normalizers": normalizers_case,
        "routing": routing_case,
    }
    draw.options["operation"] = operation
    return makers[operation](draw, seed, backend)


def _model(draw: Draw, backend: str, config: SRPOConfig, rows: tuple[int, ...], **limits: Any) -> ModelShape:
    return draw_model(draw, rows, config, widest=torch.float32 if backend == "triton" else torch.float64, **limits)


def _call(draw: Draw, backend: str, vocab_size: int, models: int, dtype: torch.dtype) -> dict[str, Any]:
    """What the library alone is told."""
    times = draw.one_of("workspace", None, None, 1, 2, 5)
    floor = workspace_floor(vocab_size, dtype.itemsize, models, backend)
    return {"backend": backend, "workspace_bytes": None if times is None else times * floor}


def _loss_case(draw: Draw, seed: int, backend: str) -> Case:
    config, rows = draw_config(draw), draw_rows(draw, backend)
    distills = draw.one_of("distills", True, True, True, False)
    model = _model(draw, backend, config, rows, mode=config.distillation_mode if distills else None)
    # `draw_model` may have had to leave top-k ties alone.
    config = model.config
    inputs = model.inputs | _loss_rows(draw, model, rows, config)
    if not distills:
        inputs |= dict.fromkeys(("sdpo_mask", "teacher_hidden", "teacher_weight", "teacher_bias"))
    inputs["mask"] = draw_mask(draw, rows)
    if draw.one_of("poison", False, True) and inputs["mask"] is not None:
        inputs |= poisoned(draw, inputs)
    if distills and draw.one_of("routed_teacher", False, True):
        routed = inputs["sdpo_mask"]
        inputs["teacher_hidden"] = inputs["teacher_hidden"][routed if routed.ndim == 1 else routed.any(1)]
    inputs |= _tokens(draw, inputs, model, seed, distills=distills)
    if distills:
        inputs |= own_numbers(draw, config, rows, torch.promote_types(model.accumulation_dtype, torch.float32))
    other = None
    kind = draw.one_of("normalizers", None, None, "own", "merged")
    if kind is not None:
        other = (0, 0.0, 0, 0)
    if kind == "merged":
        other = (draw.random.randint(1, 50), -config.dw_beta * draw.random.uniform(0.2, 2.0), 18, 5)
    leaves = draw.one_of("leaves", *[("hidden", "weight", "bias")] * 4, ("hidden",), ("weight", "bias"), ())
    keywords = _call(draw, backend, model.vocab_size, 2 if distills else 1, model.accumulation_dtype)
    if inputs["teacher_hidden"] is not None and draw.one_of("heads", 1, 1, 3) == 3:
        keywords["teacher_head_ids"] = draw.ids(3, *rows)
    return Case(
        seed, "srpo_loss", draw.options, inputs, config, leaves,
        torch.tensor(draw.one_of("upstream", 1.0, 0.37, -2.5)), model.exact_products, other, keywords,
        draw.one_of("lanes", 16, 64, 1024),
    )  # fmt: skip


def _tokens(draw: Draw, inputs: Inputs, model: ModelShape, seed: int, *, distills: bool) -> Inputs:
    """A teacher's likeliest tokens in its place, and what rows were sampled from."""
    config, tokens = model.config, Inputs()
    by_teacher = distills and config.distillation_mode == "topk" and config.topk_of == "teacher"
    if by_teacher and draw.one_of("given", False, True):
        given = with_given_topk(to_dtypes(inputs, dict.fromkeys(MODEL_TENSORS, torch.float64)), config, config.topk)
        row_dtype = torch.promote_types(model.accumulation_dtype, torch.float32)
        given["teacher_topk_log_probs"] = given["teacher_topk_log_probs"].to(row_dtype)
        tokens |= {name: value for name, value in given.items() if name.startswith("teacher_")}
    support = draw.one_of("support", None, None, None, 1, 5, 1000)
    if support is not None:
        allowed = inputs["target_ids"].clamp(0, model.vocab_size - 1)
        tokens["support_ids"] = random_support(allowed, model.vocab_size, support, seed)
    return tokens


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
        "old_log_probs": distant(draw, "old_log_probs", log_probs, config.log_ratio_clamp is None, row_dtype),
        "ref_log_probs": distant(draw, "ref_log_probs", log_probs, "k3" in config.kl_type, row_dtype),
    }
    if inputs["ref_log_probs"] is None and config.kl_coef != 0:
        inputs["ref_log_probs"] = log_probs.to(row_dtype)
    inputs |= rollout_rows(draw, config, log_probs, row_dtype)
    if config.rollout_correction is not None and inputs["old_log_probs"] is None:
        inputs["old_log_probs"] = log_probs.to(row_dtype)
    inputs["is_weights"] = None
    if draw.one_of("is_weights", False, True):
        inputs["is_weights"] = (2 * draw.uniform(*rows) * (draw.uniform(*rows) > 0.2)).to(row_dtype)
    if len(rows) == 1:
        inputs["sequence_ids"] = SEQUENCE_NAMES[draw.ids(len(SEQUENCE_NAMES), *rows)]
    routed = rows if draw.one_of("sdpo_mask", "[B]", "[B]", "[B, T]") == "[B, T]" else rows[:1]
    inputs["sdpo_mask"] = draw.uniform(*routed) < draw.one_of("routed", 0.5, 0.5, 1.0, 0.0)
    return inputs


def _stats_case(draw: Draw, seed: int, backend: str) -> Case:
    operation = draw.options["operation"]
    config, rows = draw_config(draw), draw_rows(draw, backend)
    teacher = operation != "teacher_stats" and draw.one_of("teacher_given", True, True, True, False)
    model = _model(draw, backend, config, rows, mode=config.distillation_mode if teacher else None)
    # `draw_model` may have had to leave top-k ties alone.
    config = model.config
    inputs = model.inputs | {"mask": draw_mask(draw, rows)}
    if draw.one_of("poison", False, True) and inputs["mask"] is not None:
        inputs |= poisoned(draw, inputs)
    names = ("hidden", "weight", "bias", "target_ids", "mask")
    if teacher:
        names += ("teacher_hidden", "teacher_weight", "teacher_bias")
    inputs = {name: inputs[name] for name in names}
    if operation != "teacher_stats":
        inputs |= _tokens(draw, inputs, model, seed, distills=teacher)
    if teacher:
        inputs |= own_numbers(draw, config, rows, torch.promote_types(model.accumulation_dtype, torch.float32))
    leaves = () if operation == "teacher_stats" else draw.one_of("leaves", *[("hidden", "weight", "bias")] * 2, ())
    keywords = _call(draw, backend, model.vocab_size, 1 + teacher, model.accumulation_dtype)
    one_dtype = len({x.dtype for name, x in inputs.items() if x is not None and name in MODEL_TENSORS}) == 1
    few = inputs.get("support_ids") is not None or (teacher and config.distillation_mode != "full")
    mixed = teacher and (has_mixture(config.divergence) or config.teacher_transform is not None)
    mixed |= teacher and (config.divergence_clip is not None or "divergence_clip" in inputs)
    if backend == "triton" and operation != "fused_loss" and not (leaves or few or mixed) and one_dtype:
        keywords["engine"] = draw.one_of("engine", "rows", "tile")
    if operation == "fused_loss":
        draw.one_of("teacher_mask", None, 0.5, 0.0)
    upstream = draw.normal(6, *rows) * (draw.uniform(6, *rows) < 0.7)
    return Case(
        seed, operation, draw.options, inputs, config, leaves, upstream,
        model.exact_products, None, keywords, draw.one_of("lanes", 16, 64, 1024),
    )  # fmt: skip
