"""``token_stats`` and ``teacher_stats`` as an operation, and its backward, which computes logits again, as another."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from srpo_kernels.engine import ops, stats
from srpo_kernels.engine.agreement import agree
from srpo_kernels.engine.arguments import StatsArguments, StatsOptions, parse
from srpo_kernels.engine.batch import Head, Needs
from srpo_kernels.engine.prepare import flat_rows
from srpo_kernels.engine.prepare_stats import prepare_stats, tiles
from srpo_kernels.engine.stats import Statistics
from srpo_kernels.rows.dtypes import accumulation_dtype, wide_dtype

_DIFFERENTIABLE = ("log_probs", "entropy", "divergence", "logsumexp")


class _Upstream(NamedTuple):
    """The upstream gradients, in the shape of the rows, those of a divergence that is not there empty."""

    log_probs: Tensor
    entropy: Tensor
    divergence: Tensor
    logsumexp: Tensor


_STUDENTS = ("log_probs", "entropy", "logsumexp")


def token_stats(call: StatsArguments, options: StatsOptions) -> Statistics:
    """Statistics of every row, 0 in masked ones; the first four carry gradient to hidden states, weight and bias.

    Without a teacher there are the student's alone, and the others are empty.
    """
    statistics = ops.run(torch.ops.srpo_kernels.token_stats, _TokenStats, call, options)
    # The backward knows one of them again: the caller's may be changed in place.
    return Statistics._make(x.clone() for x in statistics)


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    call, options, needs = parse(arguments, StatsArguments, StatsOptions, Needs)
    with torch.autocast(call.hidden.device.type, enabled=False):
        vocabulary = agree(call, options, needs)
        tiled = tiles(call, options, needs, vocabulary)
        prepared = prepare_stats(call, options, vocabulary, tiled=tiled, check=True)
        result = stats.forward(flat_rows(call.hidden), Head(call.weight, call.bias), prepared)
    shape = call.hidden.shape[:-1]
    values = [_spread(x, prepared.rows, shape) for x in result]
    return ops.dense(tuple(values), result.log_probs)


def _spread(values: Tensor | None, rows: Tensor, shape: torch.Size) -> Tensor | None:
    """Values of ``rows`` in the shape of all rows, 0 elsewhere."""
    if values is None:
        return None
    flat = values.flatten()
    if len(rows) != shape.numel():
        flat = flat.new_zeros(shape.numel()).index_copy_(0, rows, flat)
    return flat.view(shape)


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    call, _, _ = parse(arguments, StatsArguments, StatsOptions, Needs)
    rows = call.hidden.new_empty(call.hidden.shape[:-1], dtype=accumulation_dtype(call.hidden, call.weight))
    present = [call.has_teacher or name in _STUDENTS for name in Statistics._fields]
    wide = wide_dtype(rows.device)
    dtypes = [wide if name == "logsumexp" else rows.dtype for name in Statistics._fields]
    values = [torch.empty_like(rows, dtype=d) if here else None for here, d in zip(present, dtypes, strict=True)]
    return ops.dense(tuple(values), rows)


def _gradients(*arguments: Any) -> tuple[Tensor, ...]:
    """dX, dW and db in the dtypes and shapes of hidden states, weight and bias."""
    upstream, call, options, needs = parse(arguments, _Upstream, StatsArguments, StatsOptions, Needs)
    if call.mask is not None:
        upstream = _Upstream._make(x.masked_fill(~call.mask, 0.0) if x.numel() else x for x in upstream)
    grads = {name: x.flatten() for name, x in upstream._asdict().items() if call.has_teacher or name in _STUDENTS}
    with torch.autocast(call.hidden.device.type, enabled=False):
        # Rows without a gradient cost nothing: the masked ones need not be found a second time.
        prepared = prepare_stats(call._replace(mask=None), options, agree(call, options, needs))
        head = Head(call.weight, call.bias)
        grad_hidden, *grad_head = stats.backward(flat_rows(call.hidden), head, prepared, grads, needs)
    if grad_hidden is not None:
        grad_hidden = grad_hidden.view(call.hidden.shape)
    return ops.dense((grad_hidden, *grad_head), call.hidden)


def _fake_gradients(*arguments: Any) -> tuple[Tensor, ...]:
    _, call, _, needs = parse(arguments, _Upstream, StatsArguments, StatsOptions, Needs)
    gradients = (
        torch.empty_like(flat_rows(call.hidden)).view(call.hidden.shape) if needs.hidden else None,
        call.weight.new_empty(call.weight.shape) if needs.weight else None,
        call.bias.new_empty(call.bias.shape) if needs.bias else None,
    )
    return ops.dense(gradients, call.hidden)


def _backward(gradients: ops.Implementation) -> ops.Backward:
    """The backward by ``gradients``: ``_gradients``, or the operator for it."""

    def backward(ctx: Any, saved: tuple[Tensor, ...], *upstream: Tensor) -> tuple[Tensor | None, ...]:
        leaves = saved[:3]
        _require_unchanged(ctx)
        results = gradients(*upstream[: len(_DIFFERENTIABLE)], *leaves, *ctx.others)
        wanted = [x if needed else None for x, needed in zip(results, ctx.needs, strict=True)]
        return (*wanted, *[None] * len(ctx.others))

    return ops.once_differentiable(backward, source=3)


def _versions(arguments: tuple[Any, ...]) -> list[int | None]:
    """How often each tensor has been changed in place; None where PyTorch does not count, or refuses the change."""
    counted = (isinstance(x, Tensor) and not x.is_inference() for x in arguments)
    return [x._version if counts else None for x, counts in zip(arguments, counted, strict=True)]


def _require_unchanged(ctx: Any) -> None:
    """Raise RuntimeError where a tensor that the backward reads again was changed in place after the forward."""
    names = StatsArguments._fields[3:]
    for name, old, new in zip(names, ctx.versions, _versions(ctx.others), strict=False):
        if old != new:
            raise RuntimeError(
                f"{name} has been changed in place since token_stats read it, version {old} has become {new}: its "
                "backward reads it again, so change a copy"
            )


class _TokenStats(torch.autograd.Function):
    """The eager form. Saves its arguments, not the logits."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _forward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, _, ctx.needs = parse(inputs, StatsArguments, StatsOptions, Needs)
        # The last is for a graph of the gradients, which leads to what they are the gradients of.
        ctx.save_for_backward(*inputs[:3], output[0])
        # A teacher's states may come from inference mode, whose tensors autograd refuses to save.
        ctx.others = inputs[3:]
        ctx.versions = _versions(ctx.others)
        ctx.mark_non_differentiable(*output[len(_DIFFERENTIABLE) :])

    backward = staticmethod(_backward(_gradients))


_CALL = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? target_ids, Tensor? mask, Tensor? teacher_hidden, "
    "Tensor? teacher_weight, Tensor? teacher_bias, Tensor? teacher_topk_ids, Tensor? teacher_topk_log_probs, "
    "Tensor? support_ids, Tensor? own_alpha, Tensor? own_clip, str divergence, float alpha, str distillation_mode, "
    "int topk, str topk_of, bool add_tail, float? divergence_clip, float temperature, float logit_scale, "
    "float? softcap, float[]? teacher_transform, str backend, str engine, SymInt? workspace_bytes, "
    f"str? vocab_parallel_group, {ops.NEEDS}"
)
_UPSTREAM = ", ".join(f"Tensor grad_{name}" for name in _DIFFERENTIABLE)
_RESULTS = ", ".join(f"Tensor result_{name}" for name in Statistics._fields)

_gradients_operator = torch.library.custom_op(
    "srpo_kernels::token_stats_backward",
    ops.with_autograd(_gradients),
    mutates_args=(),
    tags=ops.TAGS,
    schema=f"({_UPSTREAM}, {_CALL}) -> ({ops.GRADIENTS})",
)
_gradients_operator.register_fake(_fake_gradients)

_operator = torch.library.custom_op(
    "srpo_kernels::token_stats", _forward, mutates_args=(), tags=ops.TAGS, schema=f"({_CALL}) -> ({_RESULTS})"
)
_operator.register_fake(_fake_forward)
_operator.register_autograd(
    _backward(torch.ops.srpo_kernels.token_stats_backward), setup_context=_TokenStats.setup_context
)
