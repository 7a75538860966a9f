"""Pictures of the results, as PNG and SVG on an opaque background that both of a page's colour schemes can show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from srpo_kernels.verify.kinds import HeadName, Workload

matplotlib.use("Agg")

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.scaling import points

_OURS, _PEERS = "#d1495b", "#8d99ae"
# Lines need more than two colours; ours stays the same.
_LINES = {"srpo_kernels": _OURS, "naive": "#30638e", "trl": "#edae49", "liger": "#4f772d"}
_SIZE = 3.2
_LABELS = {"rows": "rows", "vocabulary": "words of the vocabulary", "active": "share of active rows"}
# A fixed salt keeps an unchanged picture unchanged.
STYLE: Any = {"font.size": 9, "svg.hashsalt": "srpo_kernels", "axes.spines.top": False, "axes.spines.right": False}


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write ``name.png`` and ``name.svg``."""
    folder.mkdir(parents=True, exist_ok=True)
    # The salt counts when the file is written.
    with plt.rc_context(STYLE):
        for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            path = folder / f"{name}.{suffix}"
            figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white", metadata=metadata)
    plt.close(figure)


def bars(cells: pd.DataFrame, heads: Sequence[HeadName], workloads: Sequence[Workload], label: str) -> Figure:
    """A panel per head and workload, a bar per provider: columns head, workload, provider, value."""
    with plt.rc_context(STYLE):
        shape = (len(heads), len(workloads))
        size = (_SIZE * len(workloads), 0.75 * _SIZE * len(heads))
        figure, panels = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
        for row, head in enumerate(heads):
            for column, workload in enumerate(workloads):
                chosen = cells[(cells["head"] == head) & (cells["workload"] == workload)]
                _bar_panel(panels[row][column], chosen, f"{head}: {workload}")
        figure.supxlabel(label, fontsize=9)
    return figure


def _bar_panel(panel: Axes, cells: pd.DataFrame, title: str) -> None:
    ordered = cells.sort_values("value", ascending=False)
    colours = [_OURS if name.startswith("srpo_kernels") else _PEERS for name in ordered["provider"]]
    drawn = panel.barh(ordered["provider"], ordered["value"], color=colours)
    panel.bar_label(
        drawn, [f"{value:.2f}" if value < 100 else f"{value:,.0f}" for value in ordered["value"]], padding=2
    )
    panel.set_title(title, fontsize=9)
    panel.margins(x=0.18)
    panel.tick_params(axis="y", length=0)
    panel.xaxis.set_visible(False)
    panel.spines["bottom"].set_visible(False)


def growth(cells: pd.DataFrame) -> Figure:
    """Time and memory against what grows, on logarithmic axes: the cells of ``scaling.csv``."""
    cells = points(cells)
    axes = list(dict.fromkeys(cells["axis"]))
    scales = {"seconds": ("seconds", 1.0), "peak_bytes": ("extra peak MiB", 2.0**20)}
    metrics = [name for name in scales if (cells["metric"] == name).any()]
    with plt.rc_context(STYLE):
        size = (_SIZE * len(axes), 0.85 * _SIZE * len(metrics))
        figure, panels = plt.subplots(len(metrics), len(axes), figsize=size, squeeze=False, layout="constrained")
        for row, metric in enumerate(metrics):
            label, unit = scales[metric]
            for column, axis in enumerate(axes):
                panel = panels[row][column]
                chosen = cells[(cells["metric"] == metric) & (cells["axis"] == axis)]
                for provider, line in chosen.sort_values("x").groupby("provider", sort=False):
                    colour = _LINES.get(str(provider), _PEERS)
                    panel.loglog(line["x"], line["median"] / unit, "o-", label=provider, color=colour, markersize=3)
                panel.set_xlabel(_LABELS[axis])
                ticks = sorted(chosen["x"].unique())
                panel.set_xticks(ticks, [f"{x:,g}" for x in ticks], fontsize=7)
                panel.xaxis.set_minor_formatter(NullFormatter())
                panel.grid(alpha=0.25)
                if column == 0:
                    panel.set_ylabel(label)
        panels[0][0].legend(frameon=False)
    return figure


def errors(cells: pd.DataFrame, metrics: dict[str, str]) -> Figure:
    """A panel per dtype and metric, a mark per provider and workload, on a logarithmic axis, one for all dtypes."""
    cells = cells.dropna(subset="median")
    dtypes = list(dict.fromkeys(cells["dtype"]))
    providers = list(dict.fromkeys(cells["provider"]))[::-1]
    markers = dict(zip(dict.fromkeys(cells["workload"]), "osv^D", strict=False))
    with plt.rc_context(STYLE):
        size = (_SIZE * len(metrics), 0.9 * _SIZE * len(dtypes))
        figure, panels = plt.subplots(
            len(dtypes), len(metrics), figsize=size, squeeze=False, sharey=True, layout="constrained"
        )
        for row, dtype in enumerate(dtypes):
            for column, (metric, label) in enumerate(metrics.items()):
                panel = panels[row][column]
                chosen = cells[(cells["dtype"] == dtype) & (cells["metric"] == metric)]
                for workload, marks in chosen.groupby("workload", sort=False):
                    heights = [providers.index(name) for name in marks["provider"]]
                    colours = [_OURS if name.startswith("srpo_kernels") else _PEERS for name in marks["provider"]]
                    panel.scatter(marks["median"], heights, c=colours, marker=markers[workload], s=22, label=workload)
                panel.set_xscale("log")
                decades = np.log10(cells.loc[cells["metric"] == metric, "median"])
                panel.set_xlim(10.0 ** np.floor(decades.min()), 10.0 ** np.ceil(decades.max()))
                panel.xaxis.set_minor_formatter(NullFormatter())
                panel.set_yticks(range(len(providers)), providers)
                panel.set_title(f"{dtype}: {label}", fontsize=9)
                panel.grid(alpha=0.25, axis="x")
        panels[0][-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
