"""A chunk of rows between its logits and its gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from srpo_kernels.engine.columns import Columns
from srpo_kernels.losses.rows import PER_TOKEN
from srpo_kernels.rows.contract import Dlogits, Statistics
from srpo_kernels.rows.passes import Request


class Part(NamedTuple):
    """Rows of a chunk that all have a teacher, or all have none: their logits, and what was reduced of them."""

    rows: Tensor
    taught: bool
    request: Request
    stats: Statistics


class Computed(NamedTuple):
    """A chunk: its hidden states as an operand, the student's logits of all of it, and its parts that are not empty.

    Or, of rows of one kind, ``columns`` of the head.
    """

    operand: Tensor
    logits: Tensor
    parts: list[Part]
    columns: Columns | None = None


def statistic(name: str, parts: list[Part], nothing: Tensor) -> Tensor:
    """Of all parts, ``[n]`` or ``[n, K]``, in the dtype of ``nothing`` ``[0]``; 0 in those that do not have it.

    The passes keep the log-sum-exp as a column, in a wide dtype: an objective sees it as it sees the others.
    """
    values: list[Tensor | None] = [getattr(part.stats, name) for part in parts]
    if name == "logsumexp":
        values = [None if x is None else x.squeeze(1).to(nothing.dtype) for x in values]
    like = next((x for x in values if x is not None), None)
    if like is None:
        like = nothing[:, None] if name in PER_TOKEN else nothing
    present = [
        like.new_zeros(len(part.rows), *like.shape[1:]) if x is None else x
        for part, x in zip(parts, values, strict=True)
    ]
    return present[0] if len(present) == 1 else torch.cat([like[:0], *present])


def join(values: Tensor, parts: list[Dlogits]) -> Dlogits:
    """The dlogits of consecutive rows as one: ``values`` are those of all of them."""
    if all(part.factor is None for part in parts):
        return Dlogits(values, None)
    factors = [values.new_ones(len(part.values), 1) if part.factor is None else part.factor for part in parts]
    return Dlogits(values, torch.cat(factors))
