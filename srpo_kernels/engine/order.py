"""Which rows are computed: those with a teacher, those without, and those that only metrics want.

Rows that have zero gradient are left out: masked ones, and those that an objective says so of. The row index is built
once, with one read by the host: that of the checks of the call's values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from srpo_kernels.engine.row_values import RowChecks


class RowOrder(NamedTuple):
    """Row indices into the flattened batch, int64, sorted by sequence where sequences matter.

    ``taught`` rows have a teacher, ``alone`` ones have none; ``inactive`` are valid ones without a teacher whose
    gradient is 0.
    """

    taught: Tensor
    alone: Tensor
    inactive: Tensor


class OrderedRows(NamedTuple):
    """The order, how many rows of each of its kinds every sequence has, and a call's normalizers as numbers."""

    order: RowOrder
    lengths: list[list[int]]
    numbers: dict[str, float]


def order_rows(
    valid: Tensor, taught: Tensor, moves: Tensor | None, sequences: Tensor | None, num_sequences: int, checks: RowChecks
) -> OrderedRows:
    """Sort rows into those with a teacher, without one, inactive and masked ones. One read by the host.

    ``valid``, ``taught`` and ``moves`` are bool ``[N]``; rows without a teacher that do not move are inactive, none
    where ``moves`` is None. ``sequences`` is int64 ``[N]``. Raises ValueError where the ``checks`` do.
    """
    kind = torch.full_like(valid, 3, dtype=torch.int64)
    kind[valid] = 2
    kind[valid if moves is None else valid & moves] = 1
    kind[valid & taught] = 0
    key = kind if sequences is None else kind * num_sequences + sequences
    order = torch.argsort(key, stable=True)
    counts = key.new_zeros(4 * num_sequences).index_add_(0, key, torch.ones_like(key))
    # A call's only read: everything that was launched before has to be done by then.
    read = torch.cat([counts.to(checks.values), checks.values]).tolist()
    numbers = checks.judge(read[len(counts) :])
    lengths = [[int(x) for x in read[start : start + num_sequences]] for start in range(0, len(counts), num_sequences)]
    return OrderedRows(RowOrder(*order.split([sum(kind) for kind in lengths])[:3]), lengths[:3], numbers)
