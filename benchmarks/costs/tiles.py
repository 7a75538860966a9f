"""What the product that keeps no logits reads and writes, and its arithmetic."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from srpo_kernels.kernels.launch import tile_launch
from srpo_kernels.kernels.tiles import Projection, tile_stats
from srpo_kernels.rows.spec import RowSpec
from tools.interpreter.launches import Access, Bools, Launch, Observer, record, storage_begin

_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class TileCost:
    """Of ``tile_stats`` over whole tiles, with one model or two.

    A model's weight is read once for so many rows, its hidden states once for so many columns. Bytes of the sums are
    per row and tile of columns; dots are in units of ``2 * N * H * V`` FLOP.
    """

    models: int
    rows_per_weight_read: float
    columns_per_hidden_read: float
    sums_stored: float
    sums_loaded: float
    dots: float


def measure_tiles(models: int) -> TileCost:
    """The cost with bf16 operands, in the tiles of a large GPU."""
    launch = tile_launch(models, _DTYPE, "other", 0)
    rows, tiles, hidden_size = 2 * launch.block_rows, 3, 2 * launch.block_hidden
    columns = tiles * launch.block_vocab
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(_DTYPE)

    parts = [Projection(randn(rows, hidden_size), randn(columns, hidden_size), None) for _ in range(models)]
    ids = torch.randint(columns, (rows,), generator=generator)
    meter = _ArgumentMeter()
    with record(meter):
        tile_stats(parts[0], parts[1] if models == 2 else None, RowSpec(divergence="forward_kl"), ids)
    weight_reads = meter.loaded["weight_ptr"] / parts[0].weight.nbytes
    hidden_reads = meter.loaded["hidden_ptr"] / parts[0].hidden.nbytes
    return TileCost(
        models,
        rows_per_weight_read=rows / weight_reads,
        columns_per_hidden_read=columns / hidden_reads,
        sums_stored=meter.stored["sums_ptr"] / (rows * tiles),
        sums_loaded=meter.loaded["sums_ptr"] / (rows * tiles),
        dots=meter.dot_flops / (2 * rows * hidden_size * columns),
    )


class _ArgumentMeter(Observer):
    """Bytes by the argument in whose storage they are."""

    def __init__(self) -> None:
        self.loaded: Counter[str] = Counter()
        self.stored: Counter[str] = Counter()
        self.dot_flops = 0
        self._storages: dict[str, tuple[int, int]] = {}

    def launch_begins(self, launch: Launch) -> None:
        self._storages = {}
        for argument in launch.tensors:
            begin = storage_begin(argument.tensor)
            self._storages[argument.name] = begin, begin + argument.tensor.untyped_storage().nbytes()

    def access(self, access: Access) -> Bools | None:
        for name, (begin, end) in self._storages.items():
            inside = access.mask & (access.addresses >= begin) & (access.addresses < end)
            (self.stored if access.kind == "store" else self.loaded)[name] += (
                int(np.count_nonzero(inside)) * access.item_size
            )
        return None

    def dot(self, m: int, n: int, k: int) -> None:
        self.dot_flops += 2 * m * n * k
