"""What an LM head multiplies: a linear layer's weight, and PEFT's adapters on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

# The layers of PEFT that adapt a head.
LORA = "peft.tuners.lora.layer.Linear"
SAVED = "peft.utils.other.ModulesToSaveWrapper"
TOKENS = "peft.tuners.trainable_tokens.layer.TrainableTokensLayer"
# Rows of the head that are in fp32 at a time.
SLICE = 8192


class LowRank(NamedTuple):
    """A LoRA on a linear layer: it adds ``up @ (scaling * down @ dropout(x))``; ``[r, H]`` and ``[V, r]``."""

    down: Tensor
    up: Tensor
    scaling: float
    dropout: nn.Module


class LinearHead(NamedTuple):
    """``row_scale * weight`` (None: ``weight``), a bias or None, and what is added to the product."""

    weight: Tensor
    bias: Tensor | None
    row_scale: Tensor | None = None
    low_rank: tuple[LowRank, ...] = ()


def linear_head(head: Any) -> LinearHead:
    """The parts of an LM head, with gradient. Raises ValueError for one that is more than a linear layer and these.

    An adapter is known by its type: while it is new, the logits do not show it.
    """
    linear, adapter = _parts_of(head)
    if adapter is None:
        return LinearHead(linear.weight, linear.bias)
    return _with_lora(adapter) if _kind(adapter) == LORA else _with_tokens(adapter)


def linear_of(head: Any) -> nn.Linear:
    """The linear layer of an LM head, of which a rank may have a part. Raises ValueError as ``linear_head`` does."""
    linear: nn.Linear = _parts_of(head)[0]
    return linear


def modules_in_use(head: nn.Module) -> Iterator[nn.Module]:
    """An LM head and the modules in it, the outer ones first, without those that PEFT keeps beside the saved one."""
    yield head
    for child in [_saved(head)] if _kind(head) == SAVED else head.children():
        yield from modules_in_use(child)


def unwrapped(module: Any) -> Any:
    """``module`` without FSDP1's wrapper."""
    return module.module if isinstance(module, FullyShardedDataParallel) else module


def _saved(head: Any) -> Any:
    active = () if head.disable_adapters else head.active_adapters
    return head.modules_to_save[active[0]] if active else head.original_module


def _parts_of(head: Any) -> tuple[Any, Any]:
    """The linear layer of a head, and the adapter of it that is more than another linear layer; None without one."""
    head = unwrapped(head)
    kind = _kind(head)
    if kind == SAVED:
        return _parts_of(_saved(head))
    adapter = unwrapped(head.token_adapter) if kind == "peft.utils.other.TrainableTokensWrapper" else head
    if _kind(adapter) not in (TOKENS, LORA):
        adapter = None
    linear = head if adapter is None else unwrapped(adapter.base_layer)
    _check_is_plain(linear, head)
    return linear, adapter


def _kind(module: Any) -> str:
    """The class of a module, whatever FSDP2 has made of it."""
    kind = next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))
    return f"{kind.__module__}.{kind.__qualname__}"


def _check_is_plain(linear: Any, head: Any) -> None:
    if (
        isinstance(linear, nn.Linear)
        and type(linear).forward is nn.Linear.forward
        and (type(linear._parameters.get("weight")) in (nn.Parameter, DTensor) or _is_flat(linear))
        and linear.weight.is_floating_point()
        and not linear.weight.is_meta
    ):
        return
    kind = _kind(head)
    if kind.startswith("peft."):
        advice = (
            "of PEFT's adapters LoRA, DoRA, trainable tokens and modules_to_save are supported there; keep others off "
            "it and, where it is tied, off the embedding"
        )
    elif isinstance(linear, nn.Linear) and getattr(linear.weight, "is_meta", False):
        advice = "its weight is offloaded, to a place where no gradient reaches it"
    else:
        advice = (
            "quantized weights are no operand of the products of loss and gradient: a quantized model must leave it "
            "out (llm_int8_skip_modules, modules_to_not_convert)"
        )
    raise ValueError(f"model must have an LM head that is an nn.Linear, and no more than that, got {kind}: {advice}")


def _is_flat(linear: nn.Linear) -> bool:
    """Whether FSDP1 has made the weight a tensor, of its flat parameter; pruning, which sets one too, has a hook."""
    return type(vars(linear).get("weight")) is Tensor and not linear._forward_pre_hooks


def _with_tokens(layer: Any) -> LinearHead:
    if layer.disable_adapters or layer.merged or not layer.active_adapters:
        return LinearHead(layer.base_layer.weight, layer.base_layer.bias)
    # PEFT's own product has no bias.
    return LinearHead(layer.get_merged_weights(layer.active_adapters), None)


def _with_lora(layer: Any) -> LinearHead:
    linear = layer.base_layer
    weight, bias = linear.weight, linear.bias
    if layer.disable_adapters or layer.merged:
        if layer.disable_adapters and layer.merged:
            raise ValueError("model must not have an adapter merged into its LM head while adapters are disabled")
        return LinearHead(weight, bias)
    scale, low_rank = None, []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        down, up, scaling = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
        dropout, variant = layer.lora_dropout[name], layer.lora_variant.get(name)
        added = layer.lora_B[name].bias
        if added is not None:
            bias = scaling * added if bias is None else bias + scaling * added
        if variant is not None:
            if type(variant).__name__ != "DoraLinearVariant":
                kind = type(variant).__name__
                raise ValueError(f"model must have LoRA or DoRA on its LM head, got {kind} in the adapter {name!r}")
            if not isinstance(dropout, nn.Identity):
                raise ValueError(
                    f"model must have DoRA without lora_dropout on its LM head, got {dropout.p} in {name!r}, "
                    "which drops of what the head's own weight multiplies too"
                )
            factor = layer.lora_magnitude_vector[name].weight / _row_norms(weight, down, up, scaling)
            scale = factor if scale is None else scale + factor - 1.0
            up = factor[:, None] * up
        low_rank.append(LowRank(down, up, scaling, dropout))
    return LinearHead(weight, bias, scale, tuple(low_rank))


@torch.no_grad()
def _row_norms(weight: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """``[V]``: of ``weight + scaling * up @ down``, a constant to DoRA's gradient (arXiv 2402.09353, section 4.3)."""
    parts = zip(weight.split(SLICE), up.split(SLICE), strict=True)
    return torch.cat([(rows.float() + scaling * (more.float() @ down.float())).norm(dim=1) for rows, more in parts])
