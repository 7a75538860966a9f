"""The LM head of a model as operands of a product, and what the model does to that product."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import srpo_kernels as sk
from srpo_kernels.integrations.transformers.adapters import linear_head
from srpo_kernels.integrations.transformers.hidden import causal_model
from srpo_kernels.integrations.transformers.shards import is_tensor_parallel

# What the configs of transformers call a factor, a divisor and a softcap of the logits.
FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class Head(NamedTuple):
    """The operands of the logits: ``[..., H]``, ``[V, H]`` and ``[V]`` or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def logit_transform(config: Any) -> sk.LogitTransform:
    """The scale and the softcap that a model's config declares, under any of the names of transformers."""
    text = config.get_text_config()
    declared = {
        name: float(value)
        for name in (*FACTORS, *DIVISORS, *SOFTCAPS)
        # MPT's models ignore their scale.
        if (value := getattr(text, name, None)) is not None and text.model_type != "mpt"
    }
    scale = math.prod(declared.get(name, 1.0) for name in FACTORS)
    divisor = math.prod(declared.get(name, 1.0) for name in DIVISORS)
    return sk.LogitTransform(
        logit_scale=scale * divisor if text.model_type == "hyperclovax" else scale / divisor,
        softcap=next((declared[name] for name in SOFTCAPS if name in declared), None),
    )


def config_for(model: Any, **options: Any) -> sk.SRPOConfig:
    """The config of a loss on ``model``: its logit scale and softcap, and ``options``, the other fields.

    It stands here, and not at ``SRPOConfig``, because the names of a scale or a softcap are those of transformers.

    Args:
        model: a causal language model, bare or wrapped; or the config of one.
        options: fields of ``SRPOConfig`` other than ``logit_scale`` and ``softcap``.

    Raises:
        TypeError, ValueError: as ``SRPOConfig`` does, and for a model that ``causal_model`` refuses.
    """
    config = model if hasattr(model, "get_text_config") else causal_model(model).config
    transform = logit_transform(config)
    return sk.SRPOConfig(logit_scale=transform.logit_scale, softcap=transform.softcap, **options)


def resolve_config(model: Any, config: sk.SRPOConfig | None) -> sk.SRPOConfig:
    """``config``, or the default one of ``model``. Raises ValueError for the logit transform of another model."""
    if config is None:
        return config_for(model)
    if not isinstance(config, sk.SRPOConfig):
        raise TypeError(f"config must be an SRPOConfig or None, got {type(config).__name__}")
    _require_transform(config.transform, model, "config", "model", "config_for(model, ...) makes one that has it")
    return config


def teacher_config(teacher: Any, config: sk.SRPOConfig | None) -> sk.SRPOConfig:
    """``config`` with the logit transform of ``teacher``, at the student's temperature where it has none of its own.

    Raises ValueError for a ``teacher_transform`` of another model.
    """
    if config is None:
        return config_for(teacher)
    if not isinstance(config, sk.SRPOConfig):
        raise TypeError(f"config must be an SRPOConfig or None, got {type(config).__name__}")
    if config.teacher_transform is not None:
        why = "None takes the teacher's"
        _require_transform(config.teacher_transform, teacher, "config.teacher_transform", "teacher", why)
        return config
    declared = logit_transform(causal_model(teacher).config)._replace(temperature=config.temperature)
    return config if declared == config.transform else replace(config, teacher_transform=declared)


def _require_transform(transform: sk.LogitTransform, model: Any, name: str, whose: str, hint: str) -> None:
    base = causal_model(model)
    declared = logit_transform(base.config)
    if transform._replace(temperature=1.0) != declared:
        raise ValueError(
            f"{name} must have the logit transform of {whose}, logit_scale={declared.logit_scale} and softcap="
            f"{declared.softcap} of {type(base).__name__}, got logit_scale={transform.logit_scale} and softcap="
            f"{transform.softcap}: {hint}"
        )


def head_operands(hidden: Tensor, head: nn.Module, *, in_head_dtype: bool = False) -> Head:
    """``hidden`` and the LM head in the dtype and on the device in which the model would multiply them.

    The device is the head's, the dtype autocast's where it is on, and the head's otherwise or with ``in_head_dtype``.
    LoRA on the head is r more columns of both: ``W h + s B A h = [W, B] [h, s A h]``, so that a small update is not
    rounded away with the weight; DoRA scales the rows of ``[W, B]``; trainable tokens replace rows. Gradients reach the
    adapters.

    Args:
        hidden: ``[..., H]``.
        head: an ``nn.Linear``, bare or in PEFT's ``modules_to_save``, LoRA, DoRA or trainable tokens.
        in_head_dtype: no autocast.

    Returns:
        ``hidden``, ``[..., H + r]``; ``weight``, ``[V, H + r]``; ``bias``. Weight and bias are DTensors where tensor
        parallelism has them: docs/vocabulary_parallel.md has what to do with them.

    Raises:
        ValueError: a head that is more than that, quantized or offloaded; it says what to do.
    """
    parts = linear_head(head)
    if is_tensor_parallel(parts.weight) and any(head.children()):
        raise ValueError(
            "model must have an LM head without adapters where tensor parallelism has it in shards, got a "
            f"{type(head).__name__}: PEFT's own forward fails with one"
        )
    device = parts.weight.device.type
    hidden = hidden.to(parts.weight.device)
    autocast = torch.is_autocast_enabled(device) and not in_head_dtype
    dtype = torch.get_autocast_dtype(device) if autocast else parts.weight.dtype
    bias = None if parts.bias is None else parts.bias.to(dtype)
    weight = parts.weight if parts.row_scale is None else parts.row_scale[:, None] * parts.weight
    if not parts.low_rank:
        return Head(hidden.to(dtype), weight.to(dtype), bias)
    columns, rows = [hidden.to(dtype)], [weight.to(dtype)]
    for part in parts.low_rank:
        down = nn.functional.linear(part.dropout(hidden.to(part.down.dtype)), part.down)
        columns.append((part.scaling * down).to(dtype))
        rows.append(part.up.to(dtype))
    return Head(torch.cat(columns, -1), torch.cat(rows, 1), bias)


def head_weight(head: nn.Module, *, in_head_dtype: bool = False) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of ``head_operands``, detached."""
    weight = linear_head(head).weight
    with torch.no_grad():
        hidden = torch.empty(0, weight.shape[1], dtype=weight.dtype, device=weight.device)
        operands = head_operands(hidden, head, in_head_dtype=in_head_dtype)
    return operands.weight, operands.bias
