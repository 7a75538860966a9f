"""The composable path: per-row statistics that carry gradient into any loss of the caller's.

Forward and backward go over chunks of rows, each with logits of its own: what a product rounds depends on its shape, so
the backward normalizes its logits by their own sums, not by the forward's. A forward without a gradient can do without
logits altogether, in tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from srpo_kernels.engine import gemm, plan, workspace
from srpo_kernels.engine.batch import Head, Needs
from srpo_kernels.rows.contract import RowGradients, RowSpec, Statistics
from srpo_kernels.rows.dtypes import accumulation_dtype
from srpo_kernels.rows.passes import Request, RowPasses


class StatsCall(NamedTuple):
    """What ``token_stats`` works on beside the student: ``rows`` (int64 ``[n]``) of N are computed."""

    target_ids: Tensor
    rows: Tensor
    spec: RowSpec
    teacher_hidden: Tensor | None
    teacher_head: Head
    workspace_bytes: int | None
    passes: RowPasses
    tiled: bool


class _Chunk(NamedTuple):
    """A ``part`` of the rows: their hidden states as an operand, and what is wanted of both models' logits."""

    part: slice
    operand: Tensor
    request: Request


def forward(hidden: Tensor, head: Head, call: StatsCall) -> Statistics:
    """Statistics of ``call.rows``, ``[n]`` each."""
    if call.tiled:
        return _forward_tiled(hidden, head, call)
    requests = (chunk.request._replace(gradient=frozenset()) for chunk in _chunks(hidden, head, call, call.rows))
    return Statistics.concatenate([call.passes.statistics(request)[0] for request in requests])


def _forward_tiled(hidden: Tensor, head: Head, call: StatsCall) -> Statistics:
    from srpo_kernels.kernels.tiles import Projection, tile_stats

    student, teacher = Projection(hidden[call.rows], *head), None
    if call.teacher_hidden is not None:
        teacher = Projection(call.teacher_hidden[call.rows], *call.teacher_head)
    target_ids = call.target_ids[call.rows] - call.passes.vocabulary.first_id
    return tile_stats(student, teacher, call.spec, target_ids, call.passes.vocabulary.combine)


def backward(
    hidden: Tensor, head: Head, call: StatsCall, grads: RowGradients, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dX ``[N, H]``, dW ``[V, H]``, db ``[V]`` in their inputs' dtypes, for ``grads`` ``[n]`` of ``call.rows``.

    Rows whose gradients are all 0 cost nothing.
    """
    dtype = accumulation_dtype(hidden, head.weight)
    moving = torch.stack([g != 0 for g in grads if g is not None]).any(0).nonzero().squeeze(1)
    rows, grads = call.rows[moving], grads.select(moving)
    grad_states = torch.zeros(len(rows), hidden.shape[1], dtype=dtype, device=hidden.device) if needs.hidden else None
    grad_head = gemm.HeadGradient(head.weight if needs.weight else None, head.bias if needs.bias else None, dtype)
    for chunk in _chunks(hidden, head, call, rows) if len(rows) else ():
        (own,) = call.passes.statistics(chunk.request)
        dlogits = call.passes.dlogits_(chunk.request, own, grads.select(chunk.part), dtype=chunk.operand.dtype)
        if grad_states is not None:
            gemm.backproject(dlogits.values, head.weight, out=grad_states[chunk.part])
        grad_head.add_weight(dlogits.values, chunk.operand)
        grad_head.add_bias(dlogits)
    grad_head.finish()

    grad_hidden = None
    call.passes.vocabulary.add_up_(grad_states, rows)
    if grad_states is not None:
        grad_hidden = torch.zeros_like(hidden)
        grad_hidden[rows] = grad_states.to(hidden.dtype)
    grad_weight = None if grad_head.weight is None else grad_head.weight.to(head.weight.dtype)
    grad_bias = None if grad_head.bias is None or head.bias is None else grad_head.bias.to(head.bias.dtype)
    return grad_hidden, grad_weight, grad_bias


def _chunks(hidden: Tensor, head: Head, call: StatsCall, rows: Tensor) -> Iterator[_Chunk]:
    """Both models' logits of ``rows``, a workspace at a time; at least one chunk."""
    dtype, models = accumulation_dtype(hidden, head.weight), 1 if call.teacher_hidden is None else 2
    memory = plan.RowMemory.of(head.weight, dtype, call.passes)
    parts = plan.row_chunks(len(rows), memory.capacity(models, call.workspace_bytes)) or [slice(0, 0)]
    longest = max(part.stop - part.start for part in parts)

    def project(states: Tensor, head: Head, ids: Tensor, out: Tensor) -> Tensor:
        operand = states[ids].to(gemm.operand_dtype(head.weight, dtype))
        gemm.project(operand, head.weight, head.bias, out=out)
        return operand

    with workspace.borrowed(models * longest, len(head.weight), dtype, hidden.device) as buffer:
        for part in parts:
            ids, y = rows[part], None
            z = buffer[: len(ids)]
            operand = project(hidden, head, ids, z)
            if call.teacher_hidden is not None:
                y = buffer[longest : longest + len(ids)]
                project(call.teacher_hidden, call.teacher_head, ids, y)
            yield _Chunk(part, operand, Request(z, y, call.spec, call.target_ids[ids], entropy=True))
