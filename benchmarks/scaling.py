"""How time and memory grow with rows, vocabulary and the share of active rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from rich import box
from rich.table import Table

from benchmarks import tables
from benchmarks.cases import DEFAULT_ACTIVE, Case, HeadName
from benchmarks.providers import ProviderName
from benchmarks.results import RESULTS, Measurement, resolve_device, write_csv
from benchmarks.speed import measure
from benchmarks.timing import Rounds

Axis = Literal["rows", "vocabulary", "active"]
AXES: tuple[Axis, ...] = get_args(Axis)

# The largest share that a routed batch can have: no padding.
_ACTIVE = (0.1, 0.2, 0.4, 0.8)
_VOCAB_SIZES = (16_384, 32_768, 65_536, 131_072, 262_144)


def scaling(
    head: HeadName = "smollm2-135m",
    axes: tuple[Axis, ...] = AXES,
    providers: tuple[ProviderName, ...] = ("srpo_kernels", "naive", "trl", "liger"),
    rows: tuple[int, ...] = (512, 1_024, 2_048, 4_096, 8_192),
    vocab_sizes: tuple[int, ...] = _VOCAB_SIZES,
    active: tuple[float, ...] = _ACTIVE,
    fixed_rows: int = 1_024,
    rounds: int = 5,
    budget: float = 30.0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int = torch.get_num_threads(),
    memory: bool = True,
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
        budget: seconds of a case after which no round begins, but for the first three.
        device: auto is a GPU where there is one.
        threads: threads of torch.
        memory: measure peak memory too.
        out: CSV file to write; one that is there is replaced.
    """
    torch.set_num_threads(threads)
    where = resolve_device(device)
    console = tables.console()
    sweeps: dict[Axis, list[Case]] = {
        "rows": [Case(head, "routed", n) for n in rows],
        "vocabulary": [Case(head, "routed", fixed_rows, vocab_size=n) for n in vocab_sizes],
        "active": [Case(head, "routed", fixed_rows, active=share) for share in active],
    }
    measurements: list[Measurement] = []
    for axis in axes:
        for case in sweeps[axis]:
            measurements += [
                m
                for m in measure(case, providers, Rounds(rounds, budget), where, threads, memory, console)
                if m.metric in ("seconds", "peak_bytes")
            ]
            write_csv(out, measurements, where, threads)
    console.print(_table(exponents(pd.DataFrame(_points(measurements)))))


def axis_of(case: Case | pd.Series) -> tuple[Axis, float]:
    """What a case of a sweep varies, and its value."""
    if not (case.vocab_size is None or pd.isna(case.vocab_size)):
        return "vocabulary", float(case.vocab_size)
    if not math.isclose(case.active, DEFAULT_ACTIVE, rel_tol=1e-3):
        return "active", float(case.active)
    return "rows", float(case.rows)


def _points(measurements: Sequence[Measurement]) -> Iterator[dict[str, object]]:
    for m in measurements:
        if m.values is not None:
            axis, x = axis_of(m.case)
            yield {"axis": axis, "x": x, "provider": m.provider, "metric": m.metric, "median": m.values.median}


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
