"""The student and the teacher of a case: hidden states, heads, banned ids, and their dtypes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reference.logits import head_logits
from srpo_kernels import SRPOConfig
from tests.inputs import MODEL_TENSORS, teacher_transform_of, transform_of

if TYPE_CHECKING:
    from tests.fuzz.case import Draw

Inputs = dict[str, Any]

_VOCABULARIES = (1, 2, 3, 7, 16, 17, 64, 129, 257, 600)
_HIDDEN_SIZES = (1, 2, 4, 7, 16, 33, 40)
_WIDE = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
# Two logits that are nearer than this, relative to the larger, may change places when they are rounded.
_TIE = 2.0**-14
# fp16 has no larger numbers.
_LARGEST_FP16 = 6e4


@dataclass(frozen=True)
class ModelShape:
    """Tensors, and what was found out about them."""

    inputs: Inputs
    config: SRPOConfig
    vocab_size: int
    exact_products: bool
    accumulation_dtype: torch.dtype


def draw_model(
    draw: Draw,
    rows: tuple[int, ...],
    config: SRPOConfig,
    *,
    widest: torch.dtype,
    mode: str | None,
) -> ModelShape:
    """Student and teacher; ``mode`` is what is compared of them, None where there is no teacher."""
    vocab_size, hidden_size = draw.one_of("vocab_size", *_VOCABULARIES), draw.one_of("hidden_size", *_HIDDEN_SIZES)
    families = ["fp32", "fp32", "fp32", "bf16", "fp16", "mixed"] + (["fp64"] if widest == torch.float64 else [])
    family = draw.one_of("dtype", *families)
    kind = draw.one_of("rows", "normal", "normal", "normal", "peaked", "flat", "integers")
    scales = [1e-3, 0.1, 1.0, 1.0, 1.0, 1.0, 10.0, 100.0, 1e4]
    scale = draw.one_of("logits", *scales, *([1e10] if kind == "integers" and family not in ("fp16", "mixed") else []))
    inputs = _student(draw, rows, vocab_size, hidden_size, kind, scale)
    inputs |= _teacher(draw, inputs, rows, vocab_size, config)
    unlikely = _unlikely(draw, inputs, config)
    dtypes = {
        name: draw.random.choice(["fp32", "bf16", "fp16"]) if family == "mixed" else family for name in MODEL_TENSORS
    }
    inputs = to_dtypes(inputs, {name: _WIDE[dtype] for name, dtype in dtypes.items()})
    # What a ban is to a teacher with a transform of its own, the tests of that say.
    bans = {} if config.teacher_transform is not None else _ban(draw, inputs, config.softcap, mode)
    accumulation = torch.float64 if family == "fp64" else torch.float32
    exact = kind == "integers" and not unlikely and config.softcap is None and config.temperature == 1.0
    exact = exact and config.teacher_transform is None
    model = ModelShape(inputs, config, vocab_size, exact, accumulation)
    inputs["target_ids"] = _targets(draw, model, bans)
    if mode == "topk" and _tied(model, bans):
        draw.options["distillation_mode"] = "full"
        model = replace(model, config=replace(config, distillation_mode="full"))
    return model


def _student(draw: Draw, rows: tuple[int, ...], vocab_size: int, hidden_size: int, kind: str, scale: float) -> Inputs:
    if kind == "integers":
        scale = 2.0 ** round(math.log2(scale))
        weight = draw.ids(7, vocab_size, hidden_size).double() - 3
        hidden = torch.nn.functional.one_hot(draw.ids(hidden_size, *rows), hidden_size).double() * scale
        bias = (draw.ids(5, vocab_size).double() - 2) * scale
    else:
        weight = draw.normal(vocab_size, hidden_size)
        hidden = draw.normal(*rows, hidden_size) * scale / math.sqrt(hidden_size)
        bias = draw.normal(vocab_size) * min(scale, 2.0)
    if kind == "flat":
        hidden = hidden * draw.one_of("flatness", 0.0, 1e-3)
        bias = bias * 1e-3
    if kind == "peaked":
        likely = weight[draw.ids(vocab_size, *rows)]
        hidden = hidden + draw.one_of("peak", 12.0, 30.0, 150.0) * likely / likely.square().sum(-1, keepdim=True)
    return {"hidden": hidden, "weight": weight, "bias": bias if draw.one_of("bias", True, True, False) else None}


def _teacher(draw: Draw, student: Inputs, rows: tuple[int, ...], vocab_size: int, config: SRPOConfig) -> Inputs:
    """Another model, or nearly the student: the regime in which self-distillation begins."""
    kind = draw.one_of("teacher", "independent", "near", "near", "same", "opposite")
    head = draw.one_of("teacher_head", "shared", "shared", "own", "own, no bias", "own, other size")
    hidden, weight, bias = student["hidden"], student["weight"], student["bias"]
    noise = {"near": 1e-4, "same": 0.0}.get(kind)
    if head == "own, other size":
        noise, width = None, draw.random.choice([1, 5, 24])
        hidden = draw.normal(*rows, width) * hidden.abs().max() / math.sqrt(width)
        weight = draw.normal(vocab_size, width)
    elif noise is not None:
        hidden = hidden * (1 + noise * draw.normal(*hidden.shape))
    else:
        hidden = -hidden if kind == "opposite" else draw.normal(*hidden.shape) * hidden.abs().max()
    if head == "shared":
        return {"teacher_hidden": hidden, "teacher_weight": None, "teacher_bias": None}
    if noise:
        weight = weight * (1 + noise * draw.normal(*weight.shape))
    if bias is None:
        bias = draw.normal(vocab_size) if noise is None else None
    return {
        "teacher_hidden": hidden,
        "teacher_weight": weight.clone(),
        "teacher_bias": None if head == "own, no bias" or bias is None else bias.clone(),
    }


def _unlikely(draw: Draw, inputs: Inputs, config: SRPOConfig) -> bool:
    """Make the last id very unlikely, under one model or both: by so many nats, where there is no softcap."""
    nats = draw.one_of("unlikely", 0.0, 0.0, 0.0, 100.0, 1000.0)
    times = draw.one_of("unlikely_to", (1, 1), (1, 3), (1, 0), (0, 1))
    for name, share in zip(("bias", "teacher_bias"), times, strict=True):
        if nats and inputs[name] is not None:
            inputs[name][-1] -= share * nats * config.temperature / config.logit_scale
    return nats > 0


def to_dtypes(inputs: Inputs, dtypes: dict[str, torch.dtype]) -> Inputs:
    """Floating tensors in the dtypes that are named for them."""

    def convert(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or name not in dtypes:
            return value
        if dtypes[name] == torch.float16:
            value = value.clamp(-_LARGEST_FP16, _LARGEST_FP16)
        return value.to(dtypes[name])

    return {name: convert(name, value) for name, value in inputs.items()}


def _ban(draw: Draw, inputs: Inputs, softcap: float | None, mode: str | None) -> dict[str, Tensor]:
    """Ban some ids in place, by the bias of one model or both; returns the banned ids by the name of the bias.

    ``mode`` is what is compared of the models, None without a teacher.
    """
    how = draw.one_of("ban", None, None, None, None, "-inf", "finfo.min")
    who = draw.one_of("ban_by", "both", "both", "teacher", "student")
    wanted = {"both": ("bias", "teacher_bias"), "teacher": ("teacher_bias",), "student": ("bias",)}[who]
    biases = [name for name in wanted if inputs[name] is not None]
    vocab_size, own_head = len(inputs["weight"]), inputs["teacher_weight"] is not None
    # Where only one model bans them, the banned ids that top-k takes in make a difference, and it may take any.
    ambiguous = mode == "topk" and own_head and len(biases) == 1 and softcap is None
    if how is None or vocab_size == 1 or not biases or ambiguous:
        draw.options["ban"] = None
        return {}
    banned = draw.uniform(vocab_size) < draw.random.choice([0.1, 0.5, 0.9])
    banned[draw.random.randrange(vocab_size)] = False
    for name in biases:
        lowest = -math.inf if how == "-inf" else torch.finfo(inputs[name].dtype).min
        inputs[name] = inputs[name].masked_fill(banned, lowest)
    # Under a softcap such a logit is -softcap: unlikely, and no ban.
    return {} if softcap is not None else dict.fromkeys(biases, banned)


def _logits(model: ModelShape, of: str = "student") -> Tensor:
    wide = to_dtypes(model.inputs, dict.fromkeys(MODEL_TENSORS, torch.float64))
    states, head = ("hidden", "") if of == "student" else ("teacher_hidden", "teacher_")
    head = head if wide[f"{head}weight"] is not None else ""
    rows = wide[states].flatten(0, -2)
    own = transform_of(model.config) if of == "student" else teacher_transform_of(model.config)
    return head_logits(rows, wide[f"{head}weight"], wide[f"{head}bias"], **own)


def _targets(draw: Draw, model: ModelShape, bans: dict[str, Tensor]) -> Tensor:
    """Ids that no model bans: the log-prob of one would be minus infinity."""
    logits, shape = _logits(model), model.inputs["hidden"].shape[:-1]
    allowed = torch.ones(model.vocab_size, dtype=torch.bool)
    for ids in bans.values():
        allowed &= ~ids
    kind = draw.one_of("targets", "any", "any", "likeliest", "least likely", "last")
    if kind == "likeliest":
        return logits.masked_fill(~allowed, -math.inf).argmax(-1).view(shape)
    if kind == "least likely":
        return logits.masked_fill(~allowed, math.inf).argmin(-1).view(shape)
    choices = allowed.nonzero().flatten()
    if kind == "last" and allowed[-1]:
        choices = choices[-1:]
    return choices[draw.ids(len(choices), *shape)]


def _tied(model: ModelShape, bans: dict[str, Tensor]) -> bool:
    """Whether rounding may change which ids are the top-k: either choice is right, and they differ."""
    k = model.config.topk
    if k >= model.vocab_size:
        return False
    top = _logits(model, model.config.topk_of).topk(k + 1, dim=-1).values
    # What both models ban has no part in any divergence, whichever of it is taken.
    matters = torch.ones(len(top), dtype=torch.bool)
    if "bias" in bans:
        matters = torch.full_like(matters, k < int((~bans["bias"]).sum()))
    largest = top.abs().amax(-1)
    return bool((matters & (top[:, -2] - top[:, -1] <= _TIE * largest)).any())
