"""The sequences of rows: sums and means over them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from srpo_kernels.distributed import max_ranks, sum_ranks
from srpo_kernels.rows.segments import segment_sums


class Sequences(NamedTuple):
    """``ids`` ``[n]`` int64 is the sequence of each row, from 0 to ``number - 1``.

    ``group`` has the ranks with other rows of the same sequences, None where there are none.
    """

    ids: Tensor
    number: int
    group: ProcessGroup | None = None

    def select(self, rows: Tensor | slice) -> Sequences:
        """The sequences of some rows, by the same numbers."""
        return self._replace(ids=self.ids[rows])

    def sum(self, values: Tensor) -> Tensor:
        """Each row's value replaced by the sum over the rows of its sequence, those of other ranks among them."""
        return self._sums(values[None])[0]

    def mean(self, values: Tensor) -> Tensor:
        """The same of the mean."""
        totals, counts = self._sums(torch.stack([values, torch.ones_like(values)])).unbind()
        return totals / counts

    def max(self, values: Tensor) -> Tensor:
        """The same of the largest value; without gradient."""
        largest = values.new_full((self.number,), -torch.inf).scatter_reduce(0, self.ids, values, "amax")
        return max_ranks(largest, self.group)[self.ids]

    def lengths(self, like: Tensor) -> Tensor:
        """The number of rows of each row's sequence, in the dtype of ``like`` ``[n]``."""
        return self.sum(torch.ones_like(like))

    def _sums(self, values: Tensor) -> Tensor:
        return sum_ranks(segment_sums(values, self.ids, self.number), self.group)[:, self.ids]
