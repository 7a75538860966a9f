"""Sums of what belongs to one place, in an order that is the same from run to run.

``index_add`` of floating-point numbers is atomic on a GPU, in whatever order its threads come. ``index_put`` with
``accumulate`` sorts the places first. On a CPU it is the other way round.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sums_in_order(device: torch.device) -> bool:
    """Whether ``index_add`` on ``device`` adds row after row."""
    return device.type == "cpu"


def segment_sums(values: Tensor, ids: Tensor, number: int) -> Tensor:
    """``values`` ``[k, n]`` summed over the columns of each of ``number`` segments: ``[k, number]``, differentiable.

    ``ids`` ``[n]`` int64 is each column's segment.
    """
    sums = values.new_zeros(len(values), number)
    if sums_in_order(values.device):
        return sums.index_add(1, ids, values)
    return sums.t().index_put((ids,), values.t(), accumulate=True).t()


def add_rows_(total: Tensor, ids: Tensor, values: Tensor) -> None:
    """Add ``values`` ``[n, ...]`` to the rows ``ids`` ``[n]`` of ``total`` in place."""
    if sums_in_order(total.device):
        total.index_add_(0, ids, values)
    else:
        total.index_put_((ids,), values, accumulate=True)
