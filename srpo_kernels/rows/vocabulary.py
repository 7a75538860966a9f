"""The vocabulary and the part of it that this process holds: all of it, or a shard of the rows of the LM head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from srpo_kernels.distributed import gather_ranks, sum_ranks_
from srpo_kernels.rows.contract import ModelSums
from srpo_kernels.rows.sums import merge, pack, unpack


@dataclass(frozen=True)
class Vocabulary:
    """``size`` ids, of which this process's head has ``own_size`` from ``first_id`` on; ``group`` has other shards.

    ``largest`` is the size of the largest shard: what all ranks lay their chunks out by.
    """

    size: int
    first_id: int
    own_size: int
    largest: int
    group: ProcessGroup | None

    @classmethod
    def whole(cls, size: int) -> Vocabulary:
        """All of it in one process."""
        return cls(size, 0, size, size, None)

    def gather(self, values: list[Tensor]) -> list[Tensor]:
        """Every shard's ``values`` in rank order, ``[shards, *shape]`` each: one exchange."""
        sizes = [x.numel() for x in values]
        # Rows are the same on all ranks: where there are none, nobody waits.
        if self.group is None or not sum(sizes):
            return [x.unsqueeze(0) for x in values]
        gathered = gather_ranks(torch.cat([x.flatten() for x in values]), self.group)
        return [part.view(-1, *x.shape) for part, x in zip(gathered.split(sizes, dim=1), values, strict=True)]

    def combine(self, parts: list[ModelSums], slope: float) -> list[ModelSums]:
        """The sums of whole rows, of one or both models, from this shard's."""
        if self.group is None:
            return parts
        (gathered,) = self.gather([pack(parts)])
        return merge(unpack(gathered), slope)

    def add_up_(self, partial: Tensor | None, rows: Tensor) -> None:
        """Put the sum over all shards in the place of the ``rows`` of ``partial`` ``[N, H]``; others are 0 in all."""
        if self.group is None or partial is None or not len(rows):
            return
        if len(rows) == len(partial):
            sum_ranks_(partial, self.group)
            return
        values = partial[rows]
        sum_ranks_(values, self.group)
        partial[rows] = values
