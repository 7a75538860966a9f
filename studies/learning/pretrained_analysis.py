"""The pretrained model's table and picture, from the CSV file of its runs: one run a method, one line a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from scipy import stats

from benchmarks.pictures import STYLE
from benchmarks.results import describe_environment
from studies.learning.analysis import COLOURS, interval
from tools.documents import markdown_table

_PANELS = {
    "reward": "share of correct replies",
    "sdpo_tokens": "share of distilled tokens",
    "teacher_entropy": "teacher entropy, nats",
    "reply_length": "reply length, tokens",
}


def read(path: Path) -> pd.DataFrame:
    """The runs; a step that distils nothing has no teacher, whose entropy the trainer's log has as 0."""
    cells = pd.read_csv(path)
    return cells.assign(teacher_entropy=cells["teacher_entropy"].where(cells["sdpo_tokens"] > 0))


def curves(cells: pd.DataFrame) -> Any:
    """Means over a quarter of the run, up to each step: single steps jump with their problems."""
    window = max(1, int(cells["step"].max()) // 4)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(_PANELS), figsize=(3 * len(_PANELS), 2.8), layout="constrained")
        for panel, (name, label) in zip(panels, _PANELS.items(), strict=True):
            for method, run in cells.dropna(subset=name).groupby("method", sort=False):
                smooth = run[name].rolling(window).mean()
                panel.plot(run["step"], smooth, color=COLOURS[method], label=method)
            panel.set(xlabel=f"step, mean of the last {window}", title=label)
            panel.grid(alpha=0.25)
        panels[0].legend(frameon=False)
    return figure


def table(cells: pd.DataFrame) -> str:
    """Every method's first and last third of the run, and its lead over grpo on the same problems."""
    steps = int(cells["step"].max())
    first, last = cells["step"] <= steps / 3, cells["step"] > 2 * steps / 3
    rewards = cells.pivot(index="step", columns="method", values="reward")
    rows = []
    for method, run in cells.groupby("method", sort=False):
        row = {"method": f"`{method}`"}
        for name, third in (("first third", first), ("last third", last)):
            mean, half = interval(run.loc[third, "reward"])
            row[f"correct, {name}"] = f"{100 * mean:.1f} ± {100 * half:.1f}"
        row["less `grpo`, all steps"] = "-" if method == "grpo" else _lead(rewards[method] - rewards["grpo"])
        for name, label, form in (
            ("sdpo_tokens", "distilled tokens, last third", ".0%"),
            ("teacher_entropy", "teacher entropy, first and last third", ".2f"),
            ("reply_length", "tokens of a reply, first and last third", ".1f"),
        ):
            thirds = (last,) if name == "sdpo_tokens" else (first, last)
            means = [run.loc[third, name].mean() for third in thirds]
            row[label] = ", ".join("-" if pd.isna(mean) else f"{mean:{form}}" for mean in means)
        rows.append(row)
    return markdown_table(
        pd.DataFrame(rows),
        f"{steps} steps, one run a method: correct replies in percent with 95 % intervals over the steps, which are of "
        f"problems and replies, not of runs. {describe_environment(cells)}.",
    )


def _lead(differences: pd.Series) -> str:
    mean, half = interval(differences)
    return f"{100 * mean:+.1f} ± {100 * half:.1f} (p = {stats.ttest_1samp(differences, 0).pvalue:.2g})"
