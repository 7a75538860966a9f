"""The LM head of a transformers model, given to a function together with the hidden states that enter it."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class LogitTransform(NamedTuple):
    """What a model does to the product of hidden states and head: ``softcap * tanh(x * logit_scale / softcap)``."""

    logit_scale: float
    softcap: float | None


class Head(NamedTuple):
    """The operands of the logits: ``[..., H]``, ``[V, H]`` and ``[V]`` or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def add_hidden_output(model: Any) -> None:
    """Let ``model(..., on_hidden=f)`` return ``f(last_hidden_state, lm_head)`` in place of its outputs.

    ``f`` runs inside of the forward, where wrappers (DDP, PEFT, autocast) have their hooks. Without ``on_hidden`` the
    forward is what it was.
    """
    forward = model.forward

    # `generate` checks its arguments against the signature.
    @functools.wraps(type(model).forward)
    def forward_or_hidden(
        self: Any, *args: Any, on_hidden: Callable[[Tensor, nn.Linear], T] | None = None, **kwargs: Any
    ) -> Any:
        if on_hidden is None:
            return forward(*args, **kwargs)
        outputs = self.base_model(*args, **kwargs, use_cache=False)
        return on_hidden(outputs.last_hidden_state, self.get_output_embeddings())

    model.forward = types.MethodType(forward_or_hidden, model)


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
    """The transform that a model's config declares: Cohere, Falcon-H1, Granite, HyperCLOVA X and Gemma have one."""
    text = config.get_text_config()
    scale = next(
        (
            float(value)
            for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if (value := getattr(text, name, None)) is not None
        ),
        1.0,
    )
    divisor = getattr(text, "logits_scaling", None)
    if divisor is not None:
        scale = float(divisor) if text.model_type == "hyperclovax" else 1.0 / divisor
    return LogitTransform(scale, getattr(text, "final_logit_softcapping", None))


@torch.no_grad()
def check_head(model: Any, transform: LogitTransform) -> None:
    """Raise ValueError unless the model's logits are the transformed product of its hidden states and its head.

    Compares a few positions. A model that does something else to its logits would be trained towards the wrong
    distribution.
    """
    vocab, _ = model.get_output_embeddings().weight.shape
    device = model.get_output_embeddings().weight.device
    input_ids = torch.arange(1, 6, device=device).remainder(vocab)[None]
    training = model.training
    model.eval()
    logits = model(input_ids=input_ids).logits.float()
    hidden, weight, bias = model(input_ids=input_ids, on_hidden=functools.partial(head_operands, in_head_dtype=True))
    model.train(training)
    ours = nn.functional.linear(hidden, weight, bias).float() * transform.logit_scale
    if transform.softcap is not None:
        ours = transform.softcap * torch.tanh(ours / transform.softcap)
    # A bf16 product is off by 2**-8 of its largest terms.
    tolerance = 1e-4 if weight.dtype == torch.float32 else 0.05
    if not torch.allclose(ours, logits, rtol=0.0, atol=tolerance * float(logits.abs().max().clamp(min=1.0))):
        raise ValueError(
            f"model must compute its logits from the last hidden states and the LM head, up to a scale and a softcap; "
            f"the logits of {type(model).__name__} are off by {float((ours - logits).abs().max()):.3g} with {transform}"
        )
