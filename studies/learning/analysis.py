"""The study's table, its statistics and its picture, from the CSV file of all runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from scipy import stats

from benchmarks.pictures import STYLE, legend_above
from benchmarks.results import describe_environment
from studies.learning.policy_optimization import MEANINGS
from tools.documents import markdown_table

# Shares of the run, of which a stage is the mean.
_STAGES = {"early": (0.0, 0.2), "middle": (0.4, 0.6), "end": (0.8, 1.0)}
COLOURS = dict(zip(MEANINGS, ("#30638e", "#edae49", "#d1495b", "#4f772d", "#8d6a9f"), strict=True))
_OURS = "srpo"
_SHARES = ("accuracy", "sdpo_rollouts")
_PANELS = {
    "accuracy": "held-out accuracy, avg@k",
    "reply_length": "reply length, characters",
    "sdpo_rollouts": "share of distilled rollouts",
    "teacher_entropy": "teacher entropy, nats",
    "seconds_per_step": "seconds per step",
}


def complete(cells: pd.DataFrame) -> pd.DataFrame:
    """Runs of the methods that have every seed that any method has, with their ``seconds_per_step``."""
    seeds = cells.groupby("method")["seed"].nunique()
    cells = cells[cells["method"].isin([name for name in MEANINGS if seeds.get(name, 0) == seeds.max()])]
    passed = cells.groupby(["method", "seed"])[["step", "train_seconds"]].diff()
    return cells.assign(seconds_per_step=passed["train_seconds"] / passed["step"])


def stage_scores(cells: pd.DataFrame) -> pd.DataFrame:
    """A line per method and seed: mean accuracy of each stage, the highest of all, and that of equal wall-clock.

    ``same_time`` is the accuracy when the fastest of all runs has ended, linear between evaluations.
    """
    steps, time = cells["step"].max(), cells.groupby(["method", "seed"])["train_seconds"].max().min()
    rows = []
    for (method, seed), run in cells.groupby(["method", "seed"], sort=False):
        share = run["step"] / steps
        scores: dict[str, Any] = {"method": method, "seed": seed}
        for stage, (low, high) in _STAGES.items():
            scores[stage] = run.loc[(share > low) & (share <= high), "accuracy"].mean()
        scores["highest"] = run["accuracy"].max()
        scores["same_time"] = float(np.interp(time, run["train_seconds"], run["accuracy"]))
        rows.append(scores)
    return pd.DataFrame(rows)


def differences(scores: pd.DataFrame, stage: str, other: str) -> tuple[float, float, float, float]:
    """Mean over seeds of srpo's score less the other's, its 95 % interval, and p of a paired t-test."""
    table = scores.pivot(index="seed", columns="method", values=stage)
    test = stats.ttest_rel(table[_OURS], table[other])
    low, high = test.confidence_interval(0.95)
    return float((table[_OURS] - table[other]).mean()), float(low), float(high), float(test.pvalue)


def stage_table(scores: pd.DataFrame, cells: pd.DataFrame) -> str:
    """Every method's stages, means over seeds with their intervals, as Markdown."""
    rows = []
    for method, own in scores.groupby("method", sort=False):
        seconds = cells.loc[cells["method"] == method, "seconds_per_step"].median()
        row = {"method": f"`{method}`", "what it is": MEANINGS[method]}
        for stage in (*_STAGES, "highest", "same_time"):
            mean, half = interval(own[stage])
            row[stage.replace("_", " ")] = f"{100 * mean:.1f} ± {100 * half:.1f}"
        rows.append(row | {"seconds per step": f"{seconds:.2f}"})
    base = 100 * cells.loc[cells["step"] == 0, "accuracy"].mean()
    stages = [f"{name}: {100 * low:.0f} to {100 * high:.0f} %" for name, (low, high) in _STAGES.items()]
    return markdown_table(
        pd.DataFrame(rows),
        f"Held-out accuracy in percent, mean and 95 % interval over {scores['seed'].nunique()} seeds "
        f"({cells['step'].max():.0f} steps; {', '.join(stages)} of them; "
        f"highest: of all evaluations; same time: when the fastest run has ended). "
        f"The supervised model is at {base:.1f}. {describe_environment(cells)}.",
    )


def difference_table(scores: pd.DataFrame) -> str:
    """srpo's lead over every other method, as Markdown."""
    others = [name for name in scores["method"].unique() if name != _OURS]
    rows = []
    for other in others:
        row = {"`srpo` less": f"`{other}`"}
        for stage in (*_STAGES, "same_time"):
            mean, low, high, p = differences(scores, stage, other)
            row[stage.replace("_", " ")] = f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}; p = {p:.2g})"
        rows.append(row)
    return markdown_table(
        pd.DataFrame(rows),
        "Differences in points, mean over pairs of the same seed with its 95 % interval, and p of a paired t-test, "
        f"not corrected for the {4 * len(others)} comparisons of the table.",
    )


def interval(values: Any) -> tuple[float, float]:
    """Mean and half of the 95 % interval of Student's t."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def curves(cells: pd.DataFrame) -> Any:
    """Means over seeds with their intervals, against steps, and accuracy against time too."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
        flat = panels.flat
        for name, label in _PANELS.items():
            panel = next(flat)
            # GRPO has no teacher.
            shown = cells.dropna(subset=name) if name in cells else cells.iloc[:0]
            for method, own in shown.groupby("method", sort=False):
                band = own.groupby("step")[name].apply(interval)
                most = 1 if name in _SHARES else np.inf
                band_line(panel, band.index.to_numpy(), band, str(method), most)
            panel.set(xlabel="step", title=label)
            panel.grid(alpha=0.25)
            if name == "accuracy":
                _by_time(next(flat), cells)
        legend_above(figure)
    return figure


def _by_time(panel: Axes, cells: pd.DataFrame) -> None:
    grid = np.linspace(0, cells.groupby(["method", "seed"])["train_seconds"].max().min(), 30)
    for method, own in cells.groupby("method", sort=False):
        runs = [np.interp(grid, run["train_seconds"], run["accuracy"]) for _, run in own.groupby("seed")]
        band_line(panel, grid, pd.Series([interval(column) for column in np.transpose(runs)]), str(method), most=1)
    panel.set(xlabel="seconds of training, processor time of one thread", title="the same against time")
    panel.grid(alpha=0.25)


def band_line(panel: Axes, x: Any, band: pd.Series, method: str, most: float = np.inf) -> None:
    """A method's mean with its interval around it, as far as the quantity goes: from 0 to ``most``."""
    mean, half = np.array(band.tolist()).T
    panel.plot(x, mean, color=COLOURS[method], label=method)  # type: ignore[index]
    low, high = np.clip((mean - half, mean + half), 0, most)
    panel.fill_between(x, low, high, color=COLOURS[method], alpha=0.15, linewidth=0)  # type: ignore[index]
