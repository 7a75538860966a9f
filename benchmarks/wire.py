"""What vocabulary parallelism sends, and what a rank holds and computes with and without it: on paper."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
from rich.console import Console

from benchmarks.options import Wire
from srpo_kernels.rows.mixture import has_mixture
from tools.documents import markdown_table, print_table, replace_marked, rich_table

_MARKER = "wire:layouts"
# What opens every call: three integers.
OPENING_BYTES = 3 * 8
# Of fp32 sums of one model, and of two side by side, which have one more.
_SUMS = 5
_PAIR = 11


class Traffic(NamedTuple):
    """Collectives of a call, and the bytes that each rank puts into them."""

    gathers: int
    gathered_bytes: int
    reductions: int
    reduced_bytes: int

    @property
    def collectives(self) -> int:
        """All of them."""
        return self.gathers + self.reductions

    def received(self, ranks: int) -> float:
        """Bytes that a rank receives: in an all-gather the others' parts, in a ring's all-reduce each part twice."""
        return (ranks - 1) * (self.gathered_bytes + 2 * self.reduced_bytes / ranks)


def distillation_numbers(mode: str, divergence: str, topk: int) -> list[int]:
    """How many numbers of a distillation row each of its exchanges carries."""
    if mode == "topk":
        return [_SUMS + 2 * topk, _SUMS + topk]
    if mode == "sampled":
        return [_PAIR]
    return [_PAIR, 2] if has_mixture(divergence) else [_PAIR]


def loss_traffic(
    policy_chunks: list[int],
    distillation_chunks: list[int],
    hidden_size: int,
    *,
    mode: str = "full",
    divergence: str = "jsd",
    topk: int = 100,
    itemsize: int = 4,
    gradient: bool = True,
    shared: bool = False,
) -> Traffic:
    """A call of ``srpo_loss`` with chunks of so many rows, forward and backward.

    ``shared``: the workspace holds the first policy chunk beside the last distillation chunk.
    """
    numbers = distillation_numbers(mode, divergence, topk)
    exchanges = [rows * _SUMS for rows in policy_chunks]
    exchanges += [rows * k for rows in distillation_chunks for k in numbers]
    rows = sum(policy_chunks) + sum(distillation_chunks)
    reduced = rows * hidden_size * itemsize if gradient else 0
    gathers = 1 + len(exchanges) - shared
    return Traffic(gathers, OPENING_BYTES + itemsize * sum(exchanges), int(reduced > 0), reduced)


class Layout(NamedTuple):
    """How a model's last step lies on GPUs: ``shards`` of the head, and the ``rows`` that each rank has states of."""

    name: str
    gpus: int
    shards: int
    rows: int
    vocab_size: int = 262_144
    hidden_size: int = 4096
    chunk_rows: int = 1024
    product_rows: int = 4096

    def line(self) -> dict[str, str]:
        """A rank's share of one step whose rows are half policy rows and half distillation rows (JSD)."""
        shard = -(-self.vocab_size // self.shards) * self.hidden_size
        half = self.rows // 2
        # As much memory as for the whole vocabulary.
        height = min(half, self.chunk_rows * self.shards)
        chunks = [height] * (half // height)
        # 3 products per policy row, 4 per distillation row.
        flops = (3 + 4) * half * 2 * shard
        # Both models' fp32 logits of a chunk, and the bf16 dlogits that wait for their products.
        workspace = (height * (4 + 4) + max(height, self.product_rows) * 2) * shard // self.hidden_size
        traffic = loss_traffic(chunks, chunks, self.hidden_size)
        replicas = self.gpus // self.shards
        # A ring's all-reduce of the head's bf16 gradient.
        across = 2 * (replicas - 1) / replicas * shard * 2
        return {
            "GPUs": f"{self.gpus:,}",
            "head": self.name,
            "weight, bf16": _gigabytes(2 * shard),
            "dW, fp32": _gigabytes(4 * shard),
            "collectives": "0" if self.shards == 1 else str(traffic.collectives),
            "workspace": _gigabytes(workspace),
            "dX, fp32": _gigabytes(4 * self.rows * self.hidden_size),
            "PFLOP": f"{flops / 1e15:.2f}",
            "wire of the loss": _gigabytes(traffic.received(self.shards)),
            "wire of dW": _gigabytes(across),
        }


def layouts(gpus: int, rows: int = 32_768, shards: int = 8) -> list[Layout]:
    """A whole head on every rank, a tensor-parallel group's shards, and a data-parallel node's shards."""
    return [
        Layout("whole", gpus, 1, rows),
        Layout(f"1/{shards}, same tokens", gpus, shards, rows),
        Layout(f"1/{shards}, gathered tokens", gpus, shards, shards * rows),
    ]


def table() -> tuple[pd.DataFrame, str]:
    """Every layout at three sizes of a cluster."""
    lines = [layout.line() for gpus in (8, 64, 1024) for layout in layouts(gpus)]
    caption = (
        "Per rank and step: V = 262,144, H = 4,096, 32,768 tokens of each rank (half policy, half distillation with "
        "JSD), chunks of 1,024 rows of the whole vocabulary or 8,192 of a shard. GB are 10⁹ bytes; wire is what a rank "
        "receives."
    )
    return pd.DataFrame(lines), caption


def wire(options: Wire) -> None:
    """What ``Wire`` describes."""
    console = Console()
    cells, caption = table()
    print_table(console, rich_table(cells, "layouts", caption))
    if options.docs is not None:
        replace_marked(options.docs, {_MARKER: markdown_table(cells, caption)})


def _gigabytes(size: float) -> str:
    return "0" if not size else f"{size / 1e9:.2f} GB"
