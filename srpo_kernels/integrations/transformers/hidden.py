"""The hidden states of a transformers model, inside of its forward and of everything that it is wrapped in."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

import srpo_kernels as sk
from srpo_kernels.integrations.transformers.adapters import modules_in_use, unwrapped
from srpo_kernels.integrations.transformers.shards import UNITS, is_partitioned, whole_parameters

T = TypeVar("T")


def causal_model(model: Any) -> PreTrainedModel:
    """The language model of transformers that ``model`` is, or that its wrappers hold.

    Raises TypeError where there is none, ValueError for one without an LM head, and for an encoder-decoder.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a model of transformers, bare or wrapped, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            name = type(module).__name__
            if module.config.is_encoder_decoder:
                raise ValueError(f"model must be a decoder alone, {name} is an encoder and a decoder")
            if module.get_output_embeddings() is None:
                raise ValueError(f"model must have an LM head, {name} has none: load it by AutoModelForCausalLM")
            return module
    raise TypeError(f"model must be a transformers.PreTrainedModel, bare or wrapped, got {type(model).__name__}")


def peft_model(model: nn.Module) -> Any:
    """The PEFT model that ``model`` is or holds; None where there is none."""
    peft = sys.modules.get("peft")
    return next((x for x in model.modules() if isinstance(x, peft.PeftModel)), None) if peft is not None else None


def outermost(model: nn.Module) -> Any:
    """What of ``model`` a forward needs on any rank: FSDP1's wrapper, a PEFT model or the language model."""
    base, adapted = causal_model(model), peft_model(model)
    return next(x for x in model.modules() if x is base or x is adapted or isinstance(x, FullyShardedDataParallel))


def lm_head(model: Any) -> Any:
    """The module of the LM head of a model of transformers, without FSDP1's wrapper."""
    return unwrapped(model.get_output_embeddings())


def call_with_hidden(
    model: nn.Module, function: Callable[[Tensor, nn.Module], T], *, padding_free: bool = False, **inputs: Any
) -> T:
    """``function(hidden, head)``, in the place of the model's forward.

    It runs where wrappers have their hooks: a parameter that FSDP has sharded is whole there, DDP reduces the
    gradients of what is returned, and PEFT has put its virtual tokens before the others.

    Args:
        model: a causal language model of transformers, bare, of PEFT, compiled, in DDP, in DeepSpeed's engine, in
            FSDP1, or sharded by ``fully_shard`` or tensor parallelism. What is compiled as a whole runs eagerly;
            compiled layers stay compiled.
        function: is given the hidden states ``[B, S, H]`` of ``last_hidden_states`` and the module of the LM head,
            which ``head_operands`` reads.
        padding_free: as in ``last_hidden_states``.
        inputs: ``input_ids`` or ``inputs_embeds``, ``attention_mask``, and what else the model takes.

    Returns:
        What ``function`` returned.

    Raises:
        TypeError, ValueError: a model that ``causal_model`` or ``call_as_forward`` refuses; one that accelerate has
            prepared for mixed precision, outside of its autocast.
    """
    base, adapted = causal_model(model), peft_model(model)
    device = base.device.type
    # accelerate casts within the forward that the function replaces.
    if not torch.is_autocast_enabled(device) and any("_original_forward" in vars(x) for x in (base, adapted) if x):
        raise ValueError(
            "model is prepared by accelerate for mixed precision, on the forward that this call replaces: make the "
            "call within accelerator.autocast()"
        )

    def run(**inputs: Any) -> T:
        hidden = last_hidden_states(base, padding_free=padding_free, **inputs)
        return with_whole_head(function, hidden, base)

    def run_adapted(**inputs: Any) -> T:
        with _forward_of(base, run):
            result: T = adapted.forward(**inputs)
        return result

    return sk.call_as_forward(model, run if adapted is None else run_adapted, **inputs)


def with_whole_head(function: Callable[[Tensor, nn.Module], T], hidden: Tensor, model: Any) -> T:
    """``function(hidden, head)``, where every part of the head is whole, and again in its backward.

    A unit of FSDP makes its own parameters whole in its own forward, and a module of ZeRO-3 as well: the function runs
    in those of all that the head has, one in the other.
    """
    head: nn.Module = lm_head(model)
    wrapped: nn.Module = model.get_output_embeddings()
    if any(map(is_partitioned, head.parameters())) and not torch.is_grad_enabled():
        with whole_parameters(head, modules_in_use(head)):
            return function(hidden, head)

    def call(hidden: Tensor) -> T:
        return function(hidden, head)

    # An adapter may have a module of another one, and a module is called once.
    for module in reversed(dict.fromkeys(modules_in_use(wrapped))):
        if isinstance(module, nn.ParameterDict):
            # PyTorch has no call of it. ZeRO-3 gathers what is read of it in a forward, for the module that is called.
            continue
        if isinstance(module, UNITS) or any(map(is_partitioned, module.parameters(recurse=False))):
            call = partial(sk.call_as_forward, module, call)
    return call(hidden)


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = {name: value for name, value in vars(module).items() if name == "forward"}
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        vars(module).update(own)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradient, dropout or gradient checkpointing; each module's mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def backbone_of(model: Any) -> Any:
    """What of a model makes its hidden states: all but the LM head."""
    # Llama 4's base model is itself.
    return model.base_model if model.base_model is not model else model.model


def last_hidden_states(
    model: Any, *, attention_mask: Tensor | None = None, padding_free: bool = False, **inputs: Any
) -> Tensor:
    """The hidden states ``[B, S, H]`` of a batch, each of them what it is in a row without padding.

    The model reads each row's tokens first and its padding last, where no token of a causal model sees it. Positions
    and a mask would not do for every model: RWKV ignores the mask, Bart's decoders count padding as positions, and
    the state of RecurrentGemma runs through it.

    Args:
        model: a causal language model of transformers.
        attention_mask: ``[B, S]``, 0 at padding, which may be anywhere in a row. None: there is none.
        padding_free: the model reads no padding but one row of all tokens, whose positions begin again at each
            sequence. Attention is of each sequence alone only where transformers takes that from positions, which
            ``check_model`` tells: flash attention skips the rest, others compute it and mask it.
        inputs: ``input_ids`` or ``inputs_embeds``, and what else the backbone takes; per token it is ``[B, S, ...]``.

    Returns:
        hidden states in the order of the inputs, with gradient. Those at padding mean nothing.

    Raises:
        ValueError: ``padding_free`` of a model that takes no positions, with positions of one's own, or with keys of
            tokens before the first one.
    """
    # PEFT names every argument that it knows of, and not every model takes them all.
    inputs = {name: value for name, value in inputs.items() if value is not None}
    backbone = backbone_of(model)
    if attention_mask is None:
        return _states(backbone, inputs)
    if padding_free:
        return _packed_hidden_states(backbone, attention_mask.bool(), inputs)
    shape = _shape_of_tokens(inputs)
    # Prefix tuning has keys and values, and a mask, of tokens that come before the first one.
    prefix, mask = attention_mask.tensor_split([attention_mask.shape[1] - shape[1]], 1)
    is_padding = (mask == 0).int()
    order = is_padding.argsort(dim=1, stable=True)
    longest = max(1, shape[1] - int(is_padding.sum(1).min()))
    tokens_first = order[:, :longest]
    inputs = _per_token(inputs, lambda value: _take(value, tokens_first))
    mask = torch.cat([prefix, _take(mask, tokens_first)], 1)
    hidden = _states(backbone, inputs | {"attention_mask": mask})
    return _take(hidden, order.argsort(dim=1).clamp(max=longest - 1))


def _packed_hidden_states(backbone: Any, attended: Tensor, inputs: dict[str, Any]) -> Tensor:
    """``[B, S, H]`` of the tokens in ``attended``, ``[B, S]``, by a forward of one row; 0 elsewhere."""
    if "position_ids" not in inspect.signature(unwrapped(backbone).forward).parameters:
        raise ValueError(f"padding_free must be False with {type(backbone).__name__}, which takes no position_ids")
    if "position_ids" in inputs:
        raise ValueError("position_ids must not be given with padding_free, which counts them itself")
    if attended.shape != _shape_of_tokens(inputs):
        raise ValueError("padding_free must be False with prefix tuning, whose keys come before the first token")
    # A batch of padding alone has a forward, too.
    kept = attended if attended.any() else torch.ones_like(attended)
    inputs = _per_token(inputs, lambda value: value[kept][None])
    positions = (kept.cumsum(1) - 1)[kept][None]
    packed = _states(backbone, inputs | {"position_ids": positions})[0]
    return packed.new_zeros(*kept.shape, packed.shape[1]).index_put(kept.nonzero(as_tuple=True), packed)


def _states(backbone: Any, inputs: dict[str, Any]) -> Tensor:
    """The hidden states of a forward, whole and on the device of its inputs: a model may be on several.

    Those of sequence parallelism are gathered: every rank has their whole gradient.
    """
    hidden: Tensor = backbone(**inputs, use_cache=False)[0]
    whole = hidden.full_tensor() if isinstance(hidden, DTensor) else hidden
    return whole.to(_tokens(inputs).device)


def _tokens(inputs: dict[str, Any]) -> Tensor:
    tokens: Tensor = inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"]
    return tokens


def _shape_of_tokens(inputs: dict[str, Any]) -> torch.Size:
    return _tokens(inputs).shape[:2]


def _per_token(inputs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """``inputs`` with the ones of tokens, ``[B, S, ...]``, changed."""
    shape = _shape_of_tokens(inputs)
    return {
        name: change(value) if isinstance(value, Tensor) and value.shape[:2] == shape else value
        for name, value in inputs.items()
    }


def _take(values: Tensor, columns: Tensor) -> Tensor:
    """Columns ``[B, K]`` of each row of ``[B, S, ...]``."""
    return values.take_along_dim(columns.view(*columns.shape, *(1,) * (values.ndim - 2)), 1)
