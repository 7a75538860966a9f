"""How time and memory grow with rows, vocabulary and the share of active rows."""

from __future__ import annotations

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.options import Axis, Scaling
from benchmarks.results import ResultsFile, read_csv, resolve_device, resolve_threads
from benchmarks.speed import measure
from srpo_kernels.verify.batches import Case
from srpo_kernels.verify.kinds import DEFAULT_ACTIVE, HEADS
from srpo_kernels.verify.rounds import Rounds
from tools.documents import print_table


def scaling(options: Scaling) -> None:
    """What ``Scaling`` describes."""
    threads = resolve_threads(options.threads)
    where = resolve_device(options.device)
    console = Console()
    head, fixed = options.head, options.fixed_rows
    sweeps: dict[Axis, list[Case]] = {
        "rows": [Case(head, "routed", n) for n in options.rows],
        "vocabulary": [Case(head, "routed", fixed, vocab_size=n) for n in options.vocab_sizes],
        "active": [Case(head, "routed", fixed, active=share) for share in options.active],
    }
    file = ResultsFile(options.out, where, threads, resume=options.resume)
    rounds = Rounds(options.rounds, options.budget, fewest=1)
    for case in file.missing([case for axis in options.axes for case in sweeps[axis]]):
        cells = measure(case, options.providers, rounds, where, threads, options.memory, console)
        file.add([m for m in cells if m.metric in ("seconds", "peak_bytes")])
    print_table(console, _table(exponents(points(read_csv(options.out)))))


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
