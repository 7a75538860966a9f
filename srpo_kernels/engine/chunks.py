"""A chunk of rows between its logits and its gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from srpo_kernels.engine.columns import Columns
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


def join(logits: Tensor, parts: list[Dlogits]) -> Dlogits:
    """The dlogits of consecutive rows as one."""
    if all(part.factor is None for part in parts):
        return Dlogits(logits, None)
    factors = [logits.new_ones(len(part.values), 1) if part.factor is None else part.factor for part in parts]
    return Dlogits(logits, torch.cat(factors))
