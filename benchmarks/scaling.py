"""How time and memory grow with rows, vocabulary and the share of active rows."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from rich import box
from rich.table import Table

from benchmarks import tables
from benchmarks.results import RESULTS, ResultsFile, read_csv, resolve_device
from benchmarks.speed import measure
from srpo_kernels.verify.batches import DEFAULT_ACTIVE, HEADS, Case, HeadName
from srpo_kernels.verify.providers import ProviderName
from srpo_kernels.verify.rounds import Rounds

Axis = Literal["rows", "vocabulary", "active"]
AXES: tuple[Axis, ...] = get_args(Axis)

# Each grows eightfold: from where what does not grow, reading W and writing dW, is small, to where a peer still ends.
_ROWS = (1_024, 2_048, 4_096, 8_192)
_VOCAB_SIZES = (16_384, 32_768, 65_536, 131_072)
# About the largest share that a routed batch can have: no padding.
_ACTIVE = (0.1, 0.2, 0.4, 0.8)


def scaling(
    head: HeadName = "smollm2-135m",
    axes: tuple[Axis, ...] = AXES,
    providers: tuple[ProviderName, ...] = ("srpo_kernels", "naive", "trl"),
    rows: tuple[int, ...] = _ROWS,
    vocab_sizes: tuple[int, ...] = _VOCAB_SIZES,
    active: tuple[float, ...] = _ACTIVE,
    fixed_rows: int = 4_096,
    rounds: int = 5,
    budget: float = 30.0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int = torch.get_num_threads(),
    memory: bool = True,
    resume: bool = False,
    out: Path = RESULTS / "scaling.csv",
) -> None:
    """Time and memory of a routed batch as one thing about it grows, and the exponents of a power law through them.

    Args:
        head: LM head by the model it is of.
        axes: what grows: rows, the vocabulary, or the share of rows that can move a weight.
        providers: what to compare.
        rows: positions of a batch, padding included.
        vocab_sizes: words of the head.
        active: shares of active rows, at most 0.82.
        fixed_rows: positions where something else grows.
        rounds: times that every provider runs, at most.
        budget: seconds of a case after which no round begins, but for the first.
        device: auto is a GPU where there is one.
        threads: threads of torch.
        memory: measure peak memory too.
        resume: keep the cases that are in `out` already and measure the others.
        out: CSV file to write; without `resume` one that is there is replaced.
    """
    torch.set_num_threads(threads)
    where = resolve_device(device)
    console = tables.console()
    sweeps: dict[Axis, list[Case]] = {
        "rows": [Case(head, "routed", n) for n in rows],
        "vocabulary": [Case(head, "routed", fixed_rows, vocab_size=n) for n in vocab_sizes],
        "active": [Case(head, "routed", fixed_rows, active=share) for share in active],
    }
    file = ResultsFile(out, where, threads, resume=resume)
    for case in file.missing([case for axis in axes for case in sweeps[axis]]):
        cells = measure(case, providers, Rounds(rounds, budget, fewest=1), where, threads, memory, console)
        file.add([m for m in cells if m.metric in ("seconds", "peak_bytes")])
    console.print(_table(exponents(points(read_csv(out)))))


def points(cells: pd.DataFrame) -> pd.DataFrame:
    """The numbers of ``scaling.csv`` with columns axis, what a case of the sweep varies, and x, its value."""
    cells = cells.dropna(subset="median")
    own = {name: head.vocab_size for name, head in HEADS.items()}
    axis = pd.Series("rows", index=cells.index)
    axis[~np.isclose(cells["active"], DEFAULT_ACTIVE, rtol=1e-3)] = "active"
    axis[cells["vocab_size"] != cells["head"].map(own)] = "vocabulary"
    x = cells["rows"].astype(float)
    x = x.mask(axis == "active", cells["active"]).mask(axis == "vocabulary", cells["vocab_size"])
    return cells.assign(axis=axis, x=x)


def exponents(points: pd.DataFrame) -> pd.DataFrame:
    """The exponent of a power law through each provider's points: columns axis, provider, metric, exponent."""
    rows = []
    for (axis, provider, metric), group in points.groupby(["axis", "provider", "metric"], sort=False):
        if len(group) > 1:
            slope = np.polyfit(np.log(group["x"]), np.log(group["median"]), 1)[0]
            rows.append({"axis": axis, "provider": provider, "metric": metric, "exponent": float(slope)})
    return pd.DataFrame(rows, columns=["axis", "provider", "metric", "exponent"])


def _table(fits: pd.DataFrame) -> Table:
    table = Table(title="exponents of growth", box=box.SIMPLE_HEAD)
    for name in fits.columns:
        table.add_column(str(name))
    for row in fits.itertuples(index=False):
        table.add_row(*(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row))
    return table
