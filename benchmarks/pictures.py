"""Pictures of the results, as PNG and SVG on an opaque background that both of a page's colour schemes can show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from benchmarks.results import describe_machine

_OURS, _PEERS = "#d1495b", "#8d99ae"
# Lines need more than two colours; ours stays the same.
_LINES = {"srpo_kernels": _OURS, "naive": "#30638e", "trl": "#edae49", "liger": "#4f772d"}
_NAMES = {"naive": "naive: full logits in torch", "trl": "trl: chunked, every row"}
_SIZE = 3.2
_LABELS = {"rows": "rows", "vocabulary": "words of the vocabulary", "active": "share of active rows"}
_WORKLOADS = {"policy": "policy loss", "jsd": "distillation, JSD", "routed": "SRPO: both, routed"}
_GIB = 2.0**30
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


def legend_above(figure: Figure) -> None:
    """One legend of all panels, where it covers none of their lines."""
    figure.legend(**legend_entries(figure.axes), loc="outside upper center", ncols=5, frameon=False)


def legend_entries(panels: Iterable[Axes]) -> dict[str, list[Any]]:
    """What the panels show, each label once."""
    entries: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    return {"handles": list(entries.values()), "labels": list(entries)}


def speed(cells: pd.DataFrame, heads: Sequence[HeadName], workloads: Sequence[Workload]) -> Figure:
    """A panel per head and workload, a bar per provider, on one scale: the ratios of ``speed.csv``."""
    mean = cells.groupby("provider")["median"].mean().sort_values(ascending=False)
    providers = [*(name for name in mean.index if name != "srpo_kernels"), "srpo_kernels"]
    with plt.rc_context(STYLE | {"font.size": 11}):
        shape = (len(heads), len(workloads))
        size = (2.2 + 2.1 * len(workloads), 1.0 + 0.28 * len(providers) * len(heads))
        figure, panels = plt.subplots(
            *shape, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
        )
        for line, head in zip(panels, heads, strict=True):
            for panel, workload in zip(line, workloads, strict=True):
                own = cells[(cells["head"] == head) & (cells["workload"] == workload)]
                _ratios(panel, own.set_index("provider")["median"].reindex(providers))
                panel.set_title(f"{head}, {own['rows'].iloc[0]:,} rows\n{_WORKLOADS[workload]}", fontsize=10)
        panels[0][0].set_xlim(0, 1.25 * cells["median"].max())
        panels[0][0].set_ylim(-0.6, len(providers) - 0.4)
        panels[0][0].set_xticks(range(0, int(cells["median"].max()) + 2, 2))
        figure.supxlabel(
            f"time of forward + backward; 1 (dashed): its matrix products alone\n{_conditions(cells)}", fontsize=10
        )
    return figure


def _ratios(panel: Axes, values: pd.Series) -> None:
    colours = [_OURS if name.startswith("srpo_kernels") else _PEERS for name in values.index]
    drawn = panel.barh(values.index, values.fillna(0.0), color=colours)
    panel.bar_label(drawn, ["–" if pd.isna(x) else f"{x:.2f}" for x in values], padding=3, fontsize=9)
    panel.axvline(1.0, color="black", linewidth=1, linestyle="--")
    panel.tick_params(axis="y", length=0)


def memory(cells: pd.DataFrame) -> Figure:
    """Extra peak memory against rows, beside that of the logits alone: those cells of ``scaling.csv``."""
    cells = cells.sort_values("x")
    first, rows = cells.iloc[0], np.array(sorted(cells["x"].unique()))
    with plt.rc_context(STYLE | {"font.size": 11}):
        figure, panel = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
        for provider, line in cells.groupby("provider", sort=False):
            name = str(provider)
            panel.plot(line["x"], line["median"] / _GIB, "o-", label=_NAMES.get(name, name), color=_colour(name))
        panel.plot(rows, 4 * rows * first["vocab_size"] / _GIB, "k:", label="[N, V] logits of one model, fp32")
        panel.set_xticks(rows, [f"{x:,.0f}" for x in rows])
        panel.set(xlabel="rows N of the batch", ylabel="extra peak memory, GiB", ylim=(0, None))
        panel.grid(alpha=0.25)
        panel.legend(frameon=False, loc="upper left", fontsize=10)
        figure.supxlabel(
            f"SRPO, forward + backward, {first['head']}: V = {first['vocab_size']:,}\n{_conditions(cells)}", fontsize=10
        )
    return figure


def growth(cells: pd.DataFrame) -> Figure:
    """Time and memory against what grows, on logarithmic axes: the cells of ``scaling.csv``."""
    axes = list(dict.fromkeys(cells["axis"]))
    scales = {"seconds": ("seconds", 1.0), "peak_bytes": ("extra peak memory, GiB", _GIB)}
    metrics = [name for name in scales if (cells["metric"] == name).any()]
    with plt.rc_context(STYLE | {"font.size": 10, "figure.constrained_layout.wspace": 0.04}):
        size = (_SIZE * len(axes), 0.6 + 0.85 * _SIZE * len(metrics))
        figure, panels = plt.subplots(
            len(metrics), len(axes), figsize=size, sharex="col", sharey="row", squeeze=False, layout="constrained"
        )
        for line, metric in zip(panels, metrics, strict=True):
            label, unit = scales[metric]
            line[0].set_ylabel(label)
            for panel, axis in zip(line, axes, strict=True):
                chosen = cells[(cells["metric"] == metric) & (cells["axis"] == axis)]
                for provider, own in chosen.sort_values("x").groupby("provider", sort=False):
                    name = str(provider)
                    panel.loglog(
                        own["x"], own["median"] / unit, "o-", label=_NAMES.get(name, name), color=_colour(name)
                    )
                ticks = sorted(chosen["x"].unique())
                panel.set_xticks(ticks, [f"{x:,g}" for x in ticks], fontsize=9)
                panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                panel.yaxis.set_major_formatter(lambda y, _: f"{y:,g}")
                for each in (panel.xaxis, panel.yaxis):
                    each.set_minor_locator(NullLocator())
                panel.grid(alpha=0.25)
        for panel, axis in zip(panels[-1], axes, strict=True):
            fixed = "" if axis == "rows" else f", {cells.loc[cells['axis'] == axis, 'rows'].iloc[0]:,} rows"
            panel.set_xlabel(_LABELS[axis] + fixed)
        legend_above(figure)
        figure.supxlabel(f"SRPO, forward + backward, {cells['head'].iloc[0]}; {_conditions(cells)}", fontsize=10)
    return figure


def errors(cells: pd.DataFrame, metrics: dict[str, str]) -> Figure:
    """A panel per dtype and metric, a mark per provider and workload, on a logarithmic axis, one for all dtypes."""
    cells = cells.dropna(subset="median")
    dtypes = list(dict.fromkeys(cells["dtype"]))
    providers = list(dict.fromkeys(cells["provider"]))[::-1]
    markers = dict(zip(dict.fromkeys(cells["workload"]), "osv^D", strict=False))
    with plt.rc_context(STYLE):
        size = (0.8 * _SIZE * len(metrics), 0.8 + 0.8 * _SIZE * len(dtypes))
        figure, panels = plt.subplots(
            len(dtypes), len(metrics), figsize=size, sharex="col", sharey=True, squeeze=False, layout="constrained"
        )
        for line, dtype in zip(panels, dtypes, strict=True):
            for panel, (metric, label) in zip(line, metrics.items(), strict=True):
                chosen = cells[(cells["dtype"] == dtype) & (cells["metric"] == metric)]
                for workload, marks in chosen.groupby("workload", sort=False):
                    heights = [providers.index(name) for name in marks["provider"]]
                    colours = [_OURS if name.startswith("srpo_kernels") else _PEERS for name in marks["provider"]]
                    panel.scatter(marks["median"], heights, c=colours, marker=markers[workload], s=22)
                panel.set_xscale("log")
                decades = np.log10(cells.loc[cells["metric"] == metric, "median"])
                panel.set_xlim(10.0 ** np.floor(decades.min()), 10.0 ** np.ceil(decades.max()))
                panel.xaxis.set_minor_formatter(NullFormatter())
                panel.set_yticks(range(len(providers)), providers)
                panel.set_title(f"{dtype}: {label}", fontsize=9)
                panel.grid(alpha=0.25, axis="x")
        for workload, marker in markers.items():
            panels[0][0].scatter([], [], c="black", marker=marker, s=22, label=workload)
        legend_above(figure)
        first = cells.iloc[0]
        figure.supxlabel(
            f"error from fp64: relative, of log-probs the largest in nats; {first['head']}, {first['rows']:,} rows, "
            f"{describe_machine(cells)}",
            fontsize=9,
        )
    return figure


def _colour(provider: str) -> str:
    return _LINES.get(provider, _PEERS)


def _conditions(cells: pd.DataFrame) -> str:
    return f"{cells['dtype'].iloc[0]}, medians; {describe_machine(cells)}"
