"""Every launch that compiles, and its time on paper."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pandas as pd

from tools.documents import markdown_table, replace_marked
from tools.gate.targets import TARGETS, Target, TargetName

if TYPE_CHECKING:
    from srpo_kernels.kernels.launch import RowLaunch, TileLaunch
    from srpo_kernels.kernels.variants import Variant
    from tools.gate.rules import Line

MARKER = "launches"

# What runs for a row, by how many models' logits it has: the kernels' labels.
PASSES = {
    1: {"row_stats": "student", "row_grad": "log-prob and entropy, into bf16"},
    2: {"row_stats": "student and teacher", "row_mixture": "jsd", "row_grad": "jsd, into bf16"},
}
TILES = {1: "student, bf16", 2: "student and teacher, bf16"}
# From the request to the data, in clocks: what has to be in flight hides it.
_MEMORY_LATENCY = 1_000
_KEPT = 10


@dataclass(frozen=True)
class Choice:
    """A launch on a target: ``time`` is a multiple of the memory's, or for tiles of the tensor cores'.

    ``lanes`` are a row launch's, ``block_rows``, ``block_vocab`` and ``block_hidden`` a tile launch's. Of several
    kernels, ``registers`` and ``blocks`` are the scarcest. ``chosen``: it is the engine's.
    """

    target: TargetName
    kind: str
    models: int
    lanes: int
    block_rows: int
    block_vocab: int
    block_hidden: int
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int
    blocks: int
    time: float
    chosen: bool


def sweep(targets: Sequence[TargetName], jobs: int = 2) -> pd.DataFrame:
    """Every launch that compiles without spills and fits, best first for each target, kind and number of models."""
    os.environ.pop("TRITON_INTERPRET", None)
    tasks = list(product(targets, ("rows", "tiles"), (1, 2)))
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        found = [choice for choices in pool.map(_choices, *zip(*tasks, strict=True)) for choice in choices]
    frame = pd.DataFrame([asdict(choice) for choice in found])
    keys = ["target", "kind", "models"]
    # Of equals the engine's is named first.
    return frame.sort_values([*keys, "time", "chosen", "registers"], ascending=[True] * 4 + [False, True])


def best(choices: pd.DataFrame) -> pd.DataFrame:
    """The ten best of each target, kind and number of models, and the engine's own."""
    rank = choices.groupby(["target", "kind", "models"]).cumcount()
    return choices[(rank < _KEPT) | choices["chosen"]]


def _choices(name: TargetName, kind: str, models: int) -> list[Choice]:
    """In a process that has Triton without the interpreter."""
    from srpo_kernels.kernels import launch

    target = TARGETS[name]
    capability = int(target.arch) // 10 if target.backend == "cuda" else 0
    vendor: launch.Vendor = "nvidia" if target.backend == "cuda" else "cdna" if target.warp_size == 64 else "rdna"
    if kind == "rows":
        own: RowLaunch | TileLaunch = launch.row_launch(models, vendor)
        others: Iterator[RowLaunch | TileLaunch] = (
            launch.RowLaunch(threads * loads // models, threads // target.warp_size)
            for threads, loads in product((128, 256, 512), (2, 4, 8))
        )
    else:
        import torch

        own = launch.tile_launch(models, torch.bfloat16, vendor, capability)
        others = (launch.TileLaunch(*sizes) for sizes in product((64, 128), (64, 128, 256), (32, 64), (4, 8), (2, 3)))
    launches = dict.fromkeys([own, *others])
    return [choice for x in launches if (choice := _choice(target, kind, models, x, chosen=x == own)) is not None]


def _choice(target: Target, kind: str, models: int, launch: Any, *, chosen: bool) -> Choice | None:
    from tools.gate.rules import measure

    try:
        lines = [measure(variant, target) for variant in _variants(target, kind, models, launch)]
    except RuntimeError:
        # It asks for more than the target has.
        return None
    if any(line.spill_bytes or not line.blocks or line.shared_bytes > target.shared_per_block for line in lines):
        return None
    time = _row_time(target, lines, launch) if kind == "rows" else _tile_time(target, launch)
    fields = asdict(launch)
    return Choice(
        target.name,
        kind,
        models,
        **{name: fields.get(name, 0) for name in ("lanes", "block_rows", "block_vocab", "block_hidden")},
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        registers=max(line.registers for line in lines),
        spill_bytes=0,
        blocks=min(line.blocks for line in lines),
        time=round(time, 3),
        chosen=chosen,
    )


def _variants(target: Target, kind: str, models: int, launch: Any) -> list[Variant]:
    from triton.backends.compiler import GPUTarget

    from srpo_kernels.kernels import variants

    wanted = PASSES[models] if kind == "rows" else {"tile_stats": TILES[models]}
    replaced = "row_launch" if kind == "rows" else "tile_launch"
    with patch.object(variants, replaced, lambda *_: launch):
        every = variants.variants(GPUTarget(target.backend, target.arch, target.warp_size))
        return [variant for variant in every if wanted.get(variant.kernel) == variant.label]


def _row_time(target: Target, lines: list[Line], launch: RowLaunch) -> float:
    """Of all passes: the memory's time, or what the busiest pipe takes, or what the bytes in flight allow."""
    assert target.device is not None
    needed = target.device.bytes_per_clock * _MEMORY_LATENCY
    times = [
        # A lane has 16 bytes of each model in flight.
        line.bytes_per_element * max(1.0, line.issue_ratio or 0.0, needed / (16.0 * launch.lanes * line.blocks))
        for line in lines
    ]
    return sum(times) / sum(line.bytes_per_element for line in lines)


def _tile_time(target: Target, launch: TileLaunch) -> float:
    """Of the dots: the tensor cores' time, or that of what a tile reads from the L2 cache."""
    assert target.device is not None
    read = target.device.tensor_flop_per_clock * (1 / launch.block_rows + 1 / launch.block_vocab)
    return max(1.0, read / target.device.l2_bytes_per_clock)


def table(choices: pd.DataFrame) -> str:
    """The engine's launch beside the best one, for each target, kind and number of models."""
    lines = []
    for (name, kind, models), group in choices.groupby(["target", "kind", "models"], sort=False):
        own, first = group[group["chosen"]].iloc[0], group.iloc[0]
        lines.append(
            {
                "target": name,
                "what": f"{kind}, {'student' if models == 1 else 'student and teacher'}",
                "the engine's": _name(own),
                "time": f"{own.time:.2f}",
                "best": "the same" if own.time <= first.time else _name(first),
                "its time": f"{first.time:.2f}",
                "compiled": f"{len(group)}",
            }
        )
    return markdown_table(pd.DataFrame(lines), _CAPTION)


_CAPTION = (
    "Launches on paper. Rows: lanes of 16 bytes, warps, and the time of all passes as a multiple of the memory's. "
    "Tiles: rows × vocabulary × hidden size, warps, stages, and the time of bf16 dots as a multiple of the tensor "
    "cores' at their peak, by what a tile reads from the L2 cache. Without spills, by data-sheet rates; of equal times "
    "the engine's."
)


def _name(choice: Any) -> str:
    if choice.kind == "rows":
        return f"{choice.lanes:,}, {choice.num_warps}"
    return (
        f"{choice.block_rows} × {choice.block_vocab} × {choice.block_hidden}, {choice.num_warps}, {choice.num_stages}"
    )


def write_table(document: Path, choices: pd.DataFrame) -> None:
    """Put the table between its markers."""
    replace_marked(document, {MARKER: table(choices)})
