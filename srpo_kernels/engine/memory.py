"""What rows cost while they are computed, and how many of them a workspace holds."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from srpo_kernels.engine import gemm
from srpo_kernels.engine.workspace import row_stride
from srpo_kernels.rows.contract import Scratch
from srpo_kernels.rows.passes import RowPasses

# Where none is given: enough rows for the products to run near their best at vocabularies up to 262k, and on an
# accelerator for a chunk's small kernels to be few: of one model's logits, or of both models' together.
_DEFAULT_WORKSPACE_CPU = 640 << 20
_ROWS_ACCELERATOR = 2048
# Products have rows in multiples of that.
_ROUND_ROWS = 1024
# Of dX and dW, where dlogits wait: dW in fp32 is read and written once for so many rows (docs/gpu.md).
_ROWS_OF_PRODUCT = 4096


class ChunkRows(NamedTuple):
    """How many rows without a teacher, or with one, a chunk has, and how many rows of both models' logits."""

    alone: int
    taught: int
    logits: int


@dataclass(frozen=True)
class RowMemory:
    """What a row costs while it is computed: its logits in every model, its scratch, its dlogits where they move.

    ``copy_itemsize`` is the size of an element of dlogits that cannot take the place of the logits, else 0. ``shards``
    is how many times the vocabulary has more ids than the ``vocab_size`` of the largest shard.
    """

    vocab_size: int
    itemsize: int
    scratch: Scratch
    device: torch.device
    copy_itemsize: int = 0
    shards: int = 1

    @classmethod
    def of(cls, weight: Tensor, dtype: torch.dtype, passes: RowPasses) -> RowMemory:
        """For logits in ``dtype`` of the head ``weight``: ``[V, H]``, or a shard of a vocabulary."""
        vocabulary = passes.vocabulary
        copy, width = gemm.dlogits_dtype(weight, dtype), vocabulary.largest
        scratch, shards = passes.scratch(width, weight.device), vocabulary.size // width
        copy_itemsize = 0 if copy == dtype else copy.itemsize
        return cls(width, dtype.itemsize, scratch, weight.device, copy_itemsize, shards)

    def floor(self, models: int) -> int:
        """Bytes that one row of ``models`` models needs."""
        return self._logits(models) + self.scratch.blocks * self._logits(1, copy=False)

    def capacity(self, models: int, workspace_bytes: int | None) -> int:
        """Rows of a chunk that fit into the workspace; a default where none is given."""
        if workspace_bytes is None:
            if self.device.type != "cpu":
                # A shard's rows are short: as much memory as for the whole vocabulary takes fewer exchanges.
                return _ROWS_ACCELERATOR * self.shards // models
            workspace_bytes = max(_DEFAULT_WORKSPACE_CPU, self.floor(models))
        # Scratch is for a block of rows at most, and for no more rows than the chunk has.
        block = self.scratch.blocks * self.scratch.rows * self._logits(1, copy=False)
        beside_a_block = (workspace_bytes - block) // self._logits(models)
        capacity = max(beside_a_block, min(self.scratch.rows, workspace_bytes // self.floor(models)), 1)
        if self.device.type != "cpu" and capacity > _ROUND_ROWS:
            capacity -= capacity % _ROUND_ROWS
        return capacity

    def most_rows(self, workspace_bytes: int | None) -> int:
        """Rows of logits beyond which dlogits that wait for a product had better have the memory: half of theirs."""
        if not self.copy_itemsize:
            return sys.maxsize
        balanced = (workspace_bytes or 0) // (self._logits(1, copy=False) + 2 * self._logits(0))
        return max(_ROWS_ACCELERATOR * self.shards, balanced - balanced % _ROUND_ROWS)

    def chunk_rows(self, workspace_bytes: int | None, *, whole: bool) -> ChunkRows:
        """Bounds of a chunk. ``whole``: its rows had better be alive together, since sequences should not be cut."""
        alone, taught = self.capacity(1, workspace_bytes), self.capacity(2, workspace_bytes)
        logits = max(alone, 2 * taught) if workspace_bytes is None else alone
        if self.copy_itemsize and workspace_bytes is not None:
            # Beside as many rows of logits, of whichever kind of rows, the dlogits of these rows fit.
            taught = max(alone // 2, 1)
        if whole:
            return ChunkRows(alone, taught, logits)
        most = self.most_rows(workspace_bytes)
        return ChunkRows(min(alone, most), min(taught, most // 2), min(logits, most))

    def waiting_rows(self, num_rows: int, longest: int, logits: int, workspace_bytes: int | None) -> int:
        """Rows whose dlogits wait for one product of dX and one of dW; 0 where these take the place of logits.

        Of ``num_rows`` in chunks of at most ``longest``, which have at most so many rows of ``logits``.
        """
        if not self.copy_itemsize:
            return 0
        rows = max(_ROWS_OF_PRODUCT, longest)
        if workspace_bytes is not None:
            alive = logits + self.scratch.blocks * min(self.scratch.rows, longest)
            rows = (workspace_bytes - alive * self._logits(1, copy=False)) // self._logits(0)
        return min(rows, num_rows)

    def _logits(self, models: int, copy: bool = True) -> int:
        return row_stride(self.vocab_size) * (models * self.itemsize + copy * self.copy_itemsize)
