"""The LM head of a transformers model, given to a function together with the hidden states that enter it."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

# What the configs of transformers call a factor, a divisor and a softcap of the logits.
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# Rows of the head that are in fp32 at a time.
_SLICE = 8192


class LogitTransform(NamedTuple):
    """What a model does to the product of hidden states and head: ``softcap * tanh(x * logit_scale / softcap)``."""

    logit_scale: float
    softcap: float | None

    def __call__(self, x: Tensor) -> Tensor:
        """The logits of a product."""
        x = x * self.logit_scale
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)


class Head(NamedTuple):
    """The operands of the logits: ``[..., H]``, ``[V, H]`` and ``[V]`` or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def add_hidden_output(model: Any) -> None:
    """Let ``model(..., on_hidden=f)`` return ``f(last_hidden_states, lm_head)`` in place of its outputs.

    ``f`` runs inside of the forward, where wrappers (DDP, PEFT, autocast) have their hooks. Without ``on_hidden`` the
    forward is what it was; with it the inputs are those of ``last_hidden_states``.
    """
    forward = model.forward

    # `generate` checks its arguments against the signature.
    @functools.wraps(type(model).forward)
    def forward_or_hidden(
        self: Any, *args: Any, on_hidden: Callable[[Tensor, nn.Linear], T] | None = None, **kwargs: Any
    ) -> Any:
        if on_hidden is None:
            return forward(*args, **kwargs)
        return on_hidden(last_hidden_states(self, *args, **kwargs), self.get_output_embeddings())

    model.forward = types.MethodType(forward_or_hidden, model)


def last_hidden_states(model: Any, *, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
    """The hidden states ``[B, S, H]`` of a batch, each of them what it is in a row without padding.

    The model reads each row's tokens first and its padding last, where no token of a causal model sees it. Positions
    and a mask would not do for every model: RWKV ignores the mask, Bart's decoders count padding as positions, and
    the state of RecurrentGemma runs through it.

    Args:
        model: a causal language model of transformers.
        attention_mask: ``[B, S]``, 0 at padding, which may be anywhere in a row. None: there is none.
        inputs: ``input_ids`` or ``inputs_embeds``, and what else the backbone takes; per token it is ``[B, S, ...]``.

    Returns:
        hidden states in the order of the inputs, with gradient. Those at padding mean nothing.
    """
    # PEFT names every argument that it knows of, and not every model takes them all.
    inputs = {name: value for name, value in inputs.items() if value is not None}
    # Llama 4's base model is itself.
    backbone = model.base_model if model.base_model is not model else model.model
    if attention_mask is None:
        hidden: Tensor = backbone(**inputs, use_cache=False)[0]
        return hidden
    shape = inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"].shape[:2]
    # Prefix tuning has keys and values, and a mask, of tokens that come before the first one.
    prefix, mask = attention_mask.tensor_split([attention_mask.shape[1] - shape[1]], 1)
    is_padding = (mask == 0).int()
    order = is_padding.argsort(dim=1, stable=True)
    longest = max(1, shape[1] - int(is_padding.sum(1).min()))
    tokens_first = order[:, :longest]
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape[:2] == shape:
            inputs[name] = _take(value, tokens_first)
    mask = torch.cat([prefix, _take(mask, tokens_first)], 1)
    hidden = backbone(**inputs, attention_mask=mask, use_cache=False)[0]
    return _take(hidden, order.argsort(dim=1).clamp(max=longest - 1))


def _take(values: Tensor, columns: Tensor) -> Tensor:
    """Columns ``[B, K]`` of each row of ``[B, S, ...]``."""
    return values.take_along_dim(columns.view(*columns.shape, *(1,) * (values.ndim - 2)), 1)


def head_operands(hidden: Tensor, head: nn.Linear, *, in_head_dtype: bool) -> Head:
    """``hidden`` and the head in the dtype in which the model would multiply them.

    That is autocast's where it is on, and the head's otherwise or with ``in_head_dtype``.
    """
    weight, bias = head.weight, head.bias
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and not in_head_dtype:
        dtype = torch.get_autocast_dtype(device)
        return Head(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return Head(hidden.to(weight.dtype), weight, bias)


def logit_transform(config: Any) -> LogitTransform:
    """The transform that a model's config declares, under any of the names that transformers has for it."""
    text = config.get_text_config()
    declared = {
        name: float(value)
        for name in (*_FACTORS, *_DIVISORS, *_SOFTCAPS)
        # MPT's models ignore their scale.
        if (value := getattr(text, name, None)) is not None and text.model_type != "mpt"
    }
    scale = math.prod(declared.get(name, 1.0) for name in _FACTORS)
    divisor = math.prod(declared.get(name, 1.0) for name in _DIVISORS)
    return LogitTransform(
        scale * divisor if text.model_type == "hyperclovax" else scale / divisor,
        next((declared[name] for name in _SOFTCAPS if name in declared), None),
    )


@torch.no_grad()
def check_head(model: Any, transform: LogitTransform) -> None:
    """Raise ValueError unless ``on_hidden`` is handed all that a model's logits are made of.

    The LM head must be a linear layer without an adapter. The logits must be the transform of its product, compared in
    fp32 whatever the model's dtype, for products of 1 to 16,384. The hidden states of a token must depend on the tokens
    up to it alone. A model that is different in any of this would be trained towards another distribution than its own.

    Runs eight tokens, and widens a slice of the head at a time.
    """
    head = model.get_output_embeddings()
    _check_is_linear(head)
    name, device = type(model).__name__, head.weight.device
    ids = torch.arange(1, 9, device=device).remainder(len(head.weight))[None]
    # The second row is the first five tokens of the first one, behind padding that is no token of its end.
    rows, mask = torch.cat([ids, ids.roll(3)]), torch.ones(2, 8, dtype=torch.long, device=device)
    rows[1, :3], mask[1, :3] = ids[0, 0], 0
    # Flash attention refuses fp32, in which a model may be loaded that is trained under autocast.
    is_wide = torch.finfo(model.dtype).bits >= 32
    needs_autocast = is_wide and "flash" in (model.config.get_text_config()._attn_implementation or "")
    probe = _Probe(head)
    training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=needs_autocast):
            with probe:
                logits = model(input_ids=ids).logits
            alone = model(input_ids=ids, on_hidden=lambda hidden, _: hidden)
            padded = model(input_ids=rows, attention_mask=mask, on_hidden=lambda hidden, _: hidden)
    finally:
        model.train(training)
    if probe.entered is None:
        raise ValueError(f"model must call its LM head for its logits, {name} does not")
    # A model that divides its hidden states has rounded them once more.
    is_same = torch.equal(alone.float(), probe.entered.float())
    tolerance = 1e-5 if is_same else max(1e-5, 4 * torch.finfo(probe.entered.dtype).eps)
    _check_logits(name, transform, probe.products(alone), logits, tolerance)
    whole, part = padded[0, -8:-3].float(), padded[1, -5:].float()
    error = float(torch.dist(part, whole) / whole.norm())
    if not error <= (1e-4 if is_wide and not needs_autocast else 1e-2):
        raise ValueError(
            f"model must be causal, its hidden states must depend on the tokens up to their own alone; those of {name} "
            f"change by {error:.2g} of their norm when later tokens become padding"
        )


def _check_is_linear(head: Any) -> None:
    """An adapter is refused by its type: while it is new, the logits do not show it."""
    # PEFT's wrapper of modules_to_save hands out the weight of the module that is in use.
    linear = head.original_module if type(head).__name__ == "ModulesToSaveWrapper" else head
    if (
        isinstance(linear, nn.Linear)
        and type(linear).forward is nn.Linear.forward
        and type(linear._parameters.get("weight")) is nn.Parameter
        and linear.weight.is_floating_point()
    ):
        return
    kind = f"{type(head).__module__}.{type(head).__qualname__}"
    advice = "a quantized model must leave it out (llm_int8_skip_modules, modules_to_not_convert)"
    if kind.startswith("peft."):
        advice = (
            "keep adapters and trainable tokens off it and, where it is tied, off the embedding; "
            "modules_to_save=['lm_head'] trains it as a whole"
        )
    raise ValueError(f"model must have an LM head that is an nn.Linear, and no more than that, got {kind}: {advice}")


class _Probe:
    """In its context a head multiplies in fp32, and its products reach 1, 4, 16, ... 16,384, by position."""

    def __init__(self, head: Any) -> None:
        self.head = head
        self.entered: Tensor | None = None
        self._stretch = torch.ones((), device=head.weight.device)

    def __enter__(self) -> None:
        self._forward = self.head.__dict__.get("forward")
        self.head.forward = self._multiply

    def __exit__(self, *_: object) -> None:
        del self.head.forward
        if self._forward is not None:
            self.head.forward = self._forward

    def _multiply(self, hidden: Tensor) -> Tensor:
        self.entered = hidden
        reach = 4.0 ** torch.arange(hidden.shape[-2], device=hidden.device).remainder(8)[:, None]
        self._stretch = reach / self._products(hidden).abs().amax(-1, keepdim=True).clamp(min=1e-30)
        return self.products(hidden)

    def products(self, hidden: Tensor) -> Tensor:
        """``[..., V]`` in fp32, stretched as those of what has entered the head."""
        products = self._products(hidden) * self._stretch
        return products if self.head.bias is None else products + self.head.bias.float()

    def _products(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            parts = [nn.functional.linear(hidden.float(), rows.float()) for rows in self.head.weight.split(_SLICE)]
            return torch.cat(parts, -1)


def _check_logits(name: str, transform: LogitTransform, products: Tensor, logits: Tensor, tolerance: float) -> None:
    must = "model must compute its logits from the last hidden states and the LM head, up to a scale and a softcap"
    expected = transform(products)
    if logits.shape != expected.shape:
        raise ValueError(f"{must}; those of {name} are {list(logits.shape)}, the product is {list(expected.shape)}")
    errors, sizes = (expected - logits).abs(), torch.maximum(expected.abs(), logits.abs()).amax(-1, keepdim=True)
    if (errors <= tolerance * sizes).all():
        return
    worst = divmod(int((errors / sizes).nan_to_num(0.0, torch.inf).argmax()), errors.shape[-1])
    product, logit, instead = (float(x.flatten(0, -2)[worst]) for x in (products, logits, expected))
    raise ValueError(
        f"{must}; {name} makes {logit:.4g} of a product of {product:.4g}, where {transform} makes {instead:.4g}"
    )
