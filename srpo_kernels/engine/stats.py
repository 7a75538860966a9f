"""The composable path: per-row statistics that carry gradient into any loss of the caller's.

Forward over chunks of rows, whose logits are then gone. Backward over slices of the vocabulary: the normalisers are
known, so each slice of dW is one product written once, and only dX accumulates. A forward without a gradient can do
without logits altogether, in tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from srpo_kernels.engine import gemm, plan, workspace
from srpo_kernels.engine.batch import Head, Needs
from srpo_kernels.engine.vocabulary import Vocabulary
from srpo_kernels.rows import DivergenceStats, RowGradients, RowPasses, RowSpec, RowStats

# Columns of a slice are a multiple of this where possible: products like whole tiles.
_COLUMN_ALIGNMENT = 128


class StatsCall(NamedTuple):
    """What ``token_stats`` works on beside the student: ``rows`` (int64 ``[n]``) of N are computed."""

    target_ids: Tensor
    rows: Tensor
    spec: RowSpec
    teacher_hidden: Tensor | None
    teacher_head: Head
    workspace_bytes: int | None
    passes: RowPasses
    vocabulary: Vocabulary
    tiled: bool

    def capacity(self, weight: Tensor, dtype: torch.dtype) -> tuple[int, int]:
        """Rows of a chunk, and how many ids each of them has logits for."""
        memory = plan.RowMemory.of(weight, dtype, self.passes, self.vocabulary)
        return memory.capacity(self.models, self.workspace_bytes), memory.vocab_size

    @property
    def models(self) -> int:
        """How many models' logits are alive at a time."""
        return 1 if self.teacher_hidden is None else 2


def forward(hidden: Tensor, head: Head, call: StatsCall) -> RowStats | DivergenceStats:
    """Statistics of ``call.rows``, ``[n]`` each."""
    if call.tiled:
        return _forward_tiled(hidden, head, call)
    dtype, vocab_size = gemm.accumulation_dtype(hidden, head.weight), len(head.weight)
    capacity, _ = call.capacity(head.weight, dtype)
    chunks = plan.row_chunks(len(call.rows), capacity) or [slice(0, 0)]
    longest = max(chunk.stop - chunk.start for chunk in chunks)

    def logits(states: Tensor, head: Head, rows: Tensor, out: Tensor) -> Tensor:
        operand = states[rows].to(gemm.operand_dtype(head.weight, dtype))
        gemm.project(operand, head.weight, head.bias, out=out)
        return out

    alone: list[RowStats] = []
    paired: list[DivergenceStats] = []
    with workspace.borrowed(call.models * longest, vocab_size, dtype, hidden.device) as buffer:
        for chunk in chunks:
            rows = call.rows[chunk]
            target_ids = call.target_ids[rows]
            z = logits(hidden, head, rows, buffer[: len(rows)])
            if call.teacher_hidden is None:
                alone.append(call.passes.row_stats(z, call.spec, target_ids=target_ids, entropy=True))
            else:
                y = logits(call.teacher_hidden, call.teacher_head, rows, buffer[longest : longest + len(rows)])
                paired.append(
                    call.passes.divergence_stats(z, y, call.spec, target_ids=target_ids, gradient=False, entropy=True)
                )
    return DivergenceStats.concatenate(paired) if paired else RowStats.concatenate(alone)


def _forward_tiled(hidden: Tensor, head: Head, call: StatsCall) -> RowStats | DivergenceStats:
    from srpo_kernels.kernels.tiles import Projection, tile_stats

    student, teacher = Projection(hidden[call.rows], *head), None
    if call.teacher_hidden is not None:
        teacher = Projection(call.teacher_hidden[call.rows], *call.teacher_head)
    target_ids = call.target_ids[call.rows] - call.vocabulary.first_id
    return tile_stats(student, teacher, call.spec, target_ids, call.vocabulary.combine)


def backward(
    hidden: Tensor,
    head: Head,
    call: StatsCall,
    stats: RowStats | DivergenceStats,
    grads: RowGradients,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dX ``[N, H]``, dW ``[V, H]``, db ``[V]`` in their inputs' dtypes, for ``grads`` ``[n]`` of ``call.rows``.

    Rows whose gradients are all 0 cost nothing.
    """
    dtype, vocab_size = gemm.accumulation_dtype(hidden, head.weight), len(head.weight)
    moving = torch.stack([g != 0 for g in grads if g is not None]).any(0).nonzero().squeeze(1)
    rows = call.rows[moving]
    stats, grads = stats.select(moving), grads.select(moving)
    target_ids = call.target_ids[rows]
    operand_dtype = gemm.operand_dtype(head.weight, dtype)
    states = hidden[rows].to(operand_dtype)
    teacher = call.teacher_head
    teacher_states = None
    if call.teacher_hidden is not None:
        teacher_states = call.teacher_hidden[rows].to(gemm.operand_dtype(teacher.weight, dtype))

    grad_states = torch.zeros(states.shape, dtype=dtype, device=hidden.device) if needs.hidden else None
    grad_weight = torch.zeros_like(head.weight) if needs.weight else None
    grad_bias = torch.zeros_like(head.bias) if needs.bias and head.bias is not None else None
    width = _slice_width(len(rows), head, call, dtype)
    with workspace.borrowed(call.models * len(rows), width, dtype, hidden.device) as buffer:
        for first in range(0, vocab_size if len(rows) else 0, width):
            ids = slice(first, min(first + width, vocab_size))
            weight = head.weight[ids].to(operand_dtype)
            z = buffer[: len(rows), : ids.stop - ids.start]
            gemm.project(states, weight, None if head.bias is None else head.bias[ids], out=z)
            y = None
            if teacher_states is not None:
                y = buffer[len(rows) :, : ids.stop - ids.start]
                bias = None if teacher.bias is None else teacher.bias[ids]
                gemm.project(teacher_states, teacher.weight[ids], bias, out=y)
            dlogits = call.passes.slice_gradient_(
                z, y, stats, grads, call.spec, target_ids=target_ids, first_id=first, dtype=operand_dtype
            )
            if grad_bias is not None:
                grad_bias[ids] = dlogits.sum(0, dtype=dtype)
            if grad_states is not None:
                gemm.backproject(dlogits, weight, out=grad_states, accumulate=True)
            if grad_weight is not None:
                gemm.weight_product(dlogits, states, out=grad_weight[ids])

    grad_hidden = None
    call.vocabulary.add_up_(grad_states, rows)
    if grad_states is not None:
        grad_hidden = torch.zeros_like(hidden)
        grad_hidden[rows] = grad_states.to(hidden.dtype)
    return grad_hidden, grad_weight, grad_bias


def _slice_width(num_rows: int, head: Head, call: StatsCall, dtype: torch.dtype) -> int:
    """Columns of a vocabulary slice whose logits fit into the workspace that the forward had."""
    capacity, largest = call.capacity(head.weight, dtype)
    width, vocab_size = capacity * largest // max(num_rows, 1), len(head.weight)
    if head.weight.dtype != dtype:
        width = min(width, gemm.slab_height(head.weight))
    width = min(width - width % _COLUMN_ALIGNMENT if width > _COLUMN_ALIGNMENT else width, vocab_size)
    return max(width, 1)
