"""Whether the hidden states and the head that a loss is given make a model's own logits."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

import srpo_kernels as sk
from srpo_kernels.integrations.transformers.adapters import SLICE, linear_head, linear_of, modules_in_use
from srpo_kernels.integrations.transformers.head import head_operands, resolve_config
from srpo_kernels.integrations.transformers.hidden import call_with_hidden, causal_model, evaluating, lm_head, outermost
from srpo_kernels.integrations.transformers.shards import release, whole_parameters
from srpo_kernels.integrations.transformers.tensor_parallel import columns_of_all, shard_of


def check_model(model: Any, config: sk.SRPOConfig | None = None, *, padding_free: bool = False) -> None:
    """Raise ValueError unless a loss from hidden states and LM head is one of the model's own logits.

    The LM head must be a linear layer, with an adapter that ``head_operands`` knows or none. The logits must be
    ``config``'s transform of its product, compared in fp32 whatever the model's dtype, for products of 1 to 16,384. The
    hidden states of a token must depend on the tokens up to it alone, in a row without padding and in one with it. A
    model that is different in any of this would be trained towards another distribution than its own.

    Runs eight tokens and a few rows of them, and widens a slice of the head at a time; ``response_loss`` calls it the
    first time that it is given a model. Of a model that is sharded, every rank makes the call.

    Args:
        model: a causal language model of transformers, bare or wrapped: see ``call_with_hidden``.
        config: its ``logit_scale`` and ``softcap`` are checked. None: those that the model's config declares.
        padding_free: rows with padding are read as in a call with that option.

    Raises:
        TypeError: no model of transformers.
        ValueError: a model that is different, with what it does instead.
    """
    base = causal_model(model)
    # Without the wrappers that compile for eight tokens, or talk to other ranks of which they need nothing.
    model = outermost(model)
    if config is None:
        config = resolve_config(model, None)
    head = lm_head(base)
    # Where a model's parts are on several devices, its inputs go to the first one.
    name, device = type(base).__name__, base.device
    ids = torch.arange(1, 9, device=device).remainder(linear_of(head).out_features)[None]
    # The first row is the first five tokens of the second one, behind padding that is no token of its end: where rows
    # are read without padding, the second one begins at an odd place, which no block of a power of two does.
    rows, mask = torch.cat([ids.roll(3), ids]), torch.ones(2, 8, dtype=torch.long, device=device)
    rows[0, :3], mask[0, :3] = ids[0, 0], 0
    others = torch.stack([rows[0].flip(0), rows[1]])
    # Flash attention refuses fp32, in which a model may be loaded that is trained under autocast.
    is_wide, is_autocast = torch.finfo(base.dtype).bits >= 32, torch.is_autocast_enabled(device.type)
    autocast: AbstractContextManager[Any] = nullcontext()
    if is_wide and not is_autocast and "flash" in (base.config.get_text_config()._attn_implementation or ""):
        autocast, is_autocast = torch.autocast(device.type, torch.bfloat16), True
    probe = _Probe(head)
    with evaluating(model), autocast, torch.compiler.set_stance("force_eager"):
        with probe:
            logits = model(input_ids=ids).logits
        if probe.entered is None:
            raise ValueError(f"model must call its LM head for its logits, {name} does not")
        alone, products = call_with_hidden(model, lambda hidden, _: (hidden, probe.products(hidden)), input_ids=ids)
        padded, *behind_others = (
            call_with_hidden(
                model, lambda hidden, _: hidden, padding_free=padding_free, input_ids=tokens, attention_mask=mask
            )
            for tokens in ([rows, others] if padding_free else [rows])
        )
    # An optimizer that is made next has to hold the shards, not what FSDP2 leaves gathered in their place.
    release(model)
    # A model that divides its hidden states has rounded them once more.
    is_same = torch.equal(alone.float(), probe.entered.to(alone.device).float())
    tolerance = 1e-5 if is_same else max(1e-5, 4 * torch.finfo(probe.entered.dtype).eps)
    _check_operands(name, probe)
    _check_logits(name, config.transform._replace(temperature=1.0), products, logits.to(products.device), tolerance)
    exact = is_wide and not is_autocast
    short, long = padded[0, -5:], padded[1, -8:]
    # A forward of the same shape has the same rounding, so that a trace of other rows is seen.
    _check_rows(name, [(long, again[1, -8:]) for again in behind_others], 2e-6 if exact else 1e-2, padding_free)
    _check_rows(name, [(short, long[:5]), (long, alone[0, -8:])], 1e-4 if exact else 1e-2, padding_free)


class _Probe:
    """In its context a head multiplies in fp32, and its products reach 1, 4, 16, ... 16,384, by position."""

    def __init__(self, head: Any) -> None:
        self.head = head
        self.entered: Tensor | None = None
        # How far an adapted head's own product is from that of its operands, relative to its largest.
        self.error, self.rounding = 0.0, 0.0
        self._stretch = torch.ones(())

    def __enter__(self) -> None:
        self._forward = self.head.__dict__.get("forward")
        self.head.forward = self._multiply

    def __exit__(self, *_: object) -> None:
        del self.head.forward
        if self._forward is not None:
            self.head.forward = self._forward

    def _multiply(self, hidden: Tensor) -> Tensor:
        if isinstance(hidden, DTensor):
            # torch's parallelize_module gives a head one, and takes one from it.
            return DTensor.from_local(self._multiply(hidden.full_tensor()), hidden.device_mesh, [Replicate()])
        self.entered = hidden
        # In the forward of a head its adapters, whose forwards are to come, may still be in parts.
        adapters = whole_parameters(self.head, modules_in_use(self.head), like=linear_of(self.head).weight)
        with adapters if any(self.head.children()) else nullcontext():
            products, bias = self._products(hidden)
        if not isinstance(self.head, nn.Linear):
            own = self._forward(hidden) if self._forward is not None else type(self.head).forward(self.head, hidden)
            error = own - (products if bias is None else products + bias)
            self.error = float(error.abs().amax() / own.abs().amax().clamp(min=1e-30))
            self.rounding = max(torch.finfo(dtype).eps for dtype in (own.dtype, hidden.dtype))
        reach = 4.0 ** torch.arange(hidden.shape[-2], device=products.device).remainder(8)[:, None]
        self._stretch = reach / products.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        return self._stretched(products, bias)

    def products(self, hidden: Tensor) -> Tensor:
        """``[..., V]`` in fp32, stretched as those of what has entered the head."""
        return self._stretched(*self._products(hidden))

    def _stretched(self, products: Tensor, bias: Tensor | None) -> Tensor:
        return products * self._stretch if bias is None else products * self._stretch + bias

    def _products(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(linear_head(self.head).weight.device.type, enabled=False):
            operands = head_operands(hidden, self.head)
            own, _ = shard_of(operands)
            wide = own.hidden.float()
            parts = [nn.functional.linear(wide, rows.float()) for rows in own.weight.split(SLICE)]
        bias = operands.bias.full_tensor() if isinstance(operands.bias, DTensor) else operands.bias
        return columns_of_all(torch.cat(parts, -1), operands.weight), None if bias is None else bias.float()


def _check_rows(name: str, pairs: list[tuple[Tensor, Tensor]], tolerance: float, padding_free: bool) -> None:
    """Of hidden states ``[S, H]`` that are to be the same."""
    errors = [float(torch.dist(part.float(), whole.float()) / whole.float().norm()) for part, whole in pairs]
    if all(error <= tolerance for error in errors):
        return
    error = max(errors)
    if padding_free:
        raise ValueError(
            f"padding_free must be False with {name}, whose hidden states change by {error:.2g} of their norm where "
            "the tokens of other rows come before them"
        )
    raise ValueError(
        f"model must be causal, its hidden states must depend on the tokens up to their own alone; those of {name} "
        f"change by {error:.2g} of their norm when later tokens become padding"
    )


def _check_operands(name: str, probe: _Probe) -> None:
    """Adapters of the head are in its own product."""
    if not probe.error <= max(1e-5, 2 * probe.rounding):
        raise ValueError(
            f"model must have an LM head whose product is that of its operands; that of {name}, a "
            f"{type(probe.head).__module__}.{type(probe.head).__qualname__}, differs by {probe.error:.2g} of its size"
        )


def _check_logits(name: str, transform: sk.LogitTransform, products: Tensor, logits: Tensor, tolerance: float) -> None:
    must = "model must compute its logits from the last hidden states and the LM head, up to a scale and a softcap"
    expected = products * transform.logit_scale
    if transform.softcap is not None:
        expected = transform.softcap * torch.tanh(expected / transform.softcap)
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
