"""The study's table, its statistics and its picture, from the CSV file of all runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from scipy import stats

from benchmarks.documents import markdown_table, replace_marked
from benchmarks.learning.policy_optimization import MEANINGS
from benchmarks.pictures import STYLE, save
from benchmarks.results import RESULTS, describe_environment

_ROOT = Path(__file__).parent.parent.parent
# Shares of the run, of which a stage is the mean.
_STAGES = {"early": (0.0, 0.2), "middle": (0.4, 0.6), "end": (0.8, 1.0)}
_COLOURS = dict(zip(MEANINGS, ("#30638e", "#edae49", "#d1495b", "#4f772d", "#8d6a9f"), strict=True))
_OURS = "srpo"
_PANELS = {
    "accuracy": "held-out accuracy, avg@k",
    "reply_length": "reply length, characters",
    "sdpo_rollouts": "share of distilled rollouts",
    "teacher_entropy": "teacher entropy, nats",
    "seconds_per_step": "seconds per step",
}


def draw(
    results: Path = RESULTS / "learning.csv",
    document: Path = _ROOT / "docs" / "learning.md",
    figures: Path = _ROOT / "docs" / "figures",
) -> None:
    """Draw the curves and write the tables of `docs/learning.md` from the study's CSV file.

    Args:
        results: what `study` wrote.
        document: takes the tables, between its markers.
        figures: folder for the picture.
    """
    if not results.exists():
        raise SystemExit(f"{results} is not there: run `python -m benchmarks.learning study` first")
    cells = pd.read_csv(results)
    cells = cells[cells["method"].isin(_complete(cells))]
    passed = cells.groupby(["method", "seed"])[["step", "train_seconds"]].diff()
    cells["seconds_per_step"] = passed["train_seconds"] / passed["step"]
    save(_curves(cells), figures, "learning")
    scores = stage_scores(cells)
    replace_marked(document, {"stages": _stage_table(scores, cells), "differences": _difference_table(scores)})


def _complete(cells: pd.DataFrame) -> list[str]:
    """Methods with every seed that any method has."""
    seeds = cells.groupby("method")["seed"].nunique()
    return [name for name in MEANINGS if seeds.get(name, 0) == seeds.max()]


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


def _stage_table(scores: pd.DataFrame, cells: pd.DataFrame) -> str:
    rows = []
    for method, own in scores.groupby("method", sort=False):
        seconds = cells.loc[cells["method"] == method, "seconds_per_step"].median()
        row = {"method": f"`{method}`", "what it is": MEANINGS[method]}
        for stage in (*_STAGES, "highest", "same_time"):
            mean, half = _interval(own[stage])
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


def _difference_table(scores: pd.DataFrame) -> str:
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


def _interval(values: Any) -> tuple[float, float]:
    """Mean and half of the 95 % interval of Student's t."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def _curves(cells: pd.DataFrame) -> Any:
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
        flat = panels.flat
        for name, label in _PANELS.items():
            panel = next(flat)
            # GRPO has no teacher.
            shown = cells.dropna(subset=name) if name in cells else cells.iloc[:0]
            for method, own in shown.groupby("method", sort=False):
                band = own.groupby("step")[name].apply(_interval)
                _line(panel, band.index.to_numpy(), band, str(method))
            panel.set(xlabel="step", title=label)
            panel.grid(alpha=0.25)
            if name == "accuracy":
                _by_time(next(flat), cells)
        panels[0][0].legend(frameon=False)
    return figure


def _by_time(panel: Axes, cells: pd.DataFrame) -> None:
    grid = np.linspace(0, cells.groupby(["method", "seed"])["train_seconds"].max().min(), 30)
    for method, own in cells.groupby("method", sort=False):
        runs = [np.interp(grid, run["train_seconds"], run["accuracy"]) for _, run in own.groupby("seed")]
        _line(panel, grid, pd.Series([_interval(column) for column in np.transpose(runs)]), str(method))
    panel.set(xlabel="seconds of training, processor time of one thread", title="the same against time")
    panel.grid(alpha=0.25)


def _line(panel: Axes, x: Any, band: pd.Series, method: str) -> None:
    mean, half = np.array(band.tolist()).T
    panel.plot(x, mean, color=_COLOURS[method], label=method)  # type: ignore[index]
    panel.fill_between(x, mean - half, mean + half, color=_COLOURS[method], alpha=0.15, linewidth=0)  # type: ignore[index]
