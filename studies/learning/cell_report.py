"""Tables and pictures of the cells and of the mechanism, from their CSV files."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.pictures import STYLE, legend_above, legend_entries
from benchmarks.results import describe_environment
from studies.learning.analysis import COLOURS, band_line, interval
from studies.learning.comparison import (
    PLACES,
    PRIMARY,
    Difference,
    by_place,
    difference,
    holm,
    is_choice,
    mechanism_means,
    outcomes,
    pairs,
)
from studies.learning.options import Method
from tools.documents import markdown_table

_NOTHING = "No comparison has been run yet."
_WHERE = {"before": "before the first wrong token", "at": "at it", "after": "after it"}
# What is held, of which kind of token, and how it is drawn.
_HELD = {
    ("student_shown", "copied"): ("student: the shown digit, copied", "#8d99ae", "-"),
    ("teacher_shown", "copied"): ("teacher: the shown digit, copied", "#d1495b", "-"),
    ("student_consistent", "total"): ("student: the consistent total", "#8d99ae", "--"),
    ("teacher_consistent", "total"): ("teacher: the consistent total", "#d1495b", "--"),
    ("teacher_shown", "total"): ("teacher: the shown total", "#edae49", "--"),
}
_COSINES = {
    "cosine_grpo": "GRPO,\nall replies",
    "cosine_distillation": "distilled,\nall tokens",
    "cosine_distillation_before": "before",
    "cosine_distillation_at": "at",
    "cosine_distillation_after": "after",
}


def cell_table(rows: pd.DataFrame) -> str:
    """Every compared method of every cell at its own learning rate, as Markdown."""
    scores = outcomes(rows)
    compared, lines = scores[~is_choice(scores)], []
    if compared.empty:
        return _NOTHING
    for (cell, method), own in compared.groupby(["cell", "method"], sort=False):
        line = {
            "cell": f"`{cell}`",
            "method": f"`{method}`",
            "learning rate": f"{own['lr'].iloc[0]:g}",
            "runs": len(own),
        }
        for outcome in ("early", "end", "best"):
            mean, half = interval(own[outcome])
            line[outcome] = f"{100 * mean:.1f} ± {100 * half:.1f}"
        lines.append(line | {"collapsed": int(own["collapsed"].sum())})
    steps = rows.loc[~is_choice(rows), "step"].max()
    starts = ", ".join(f"{cell} from {100 * start:.0f}" for cell, start in _starts(scores).items())
    return markdown_table(
        pd.DataFrame(lines),
        f"Held-out accuracy in percent, mean and 95 % interval over runs ({steps:.0f} steps; early: mean "
        f"of the first fifth, end: of the last; collapsed: runs). {starts}. "
        f"{describe_environment(_first_lines(rows))}.",
    )


def _starts(scores: pd.DataFrame) -> pd.Series:
    return scores.groupby("cell", sort=False)["start"].mean()


def _first_lines(rows: pd.DataFrame) -> pd.DataFrame:
    """What the first and the last run were run on."""
    return rows.dropna(subset="commit").iloc[[0, -1]]


def primary_differences(rows: pd.DataFrame) -> list[tuple[str, str, str, str, Difference, float]]:
    """Cell, outcome, method, the other, their difference and its p after Holm over all that there are.

    A comparison needs two pairs.
    """
    scores = outcomes(rows)
    compared, found = scores[~is_choice(scores)], []
    for cell, own in compared.groupby("cell", sort=False):
        for outcome, method, other in PRIMARY:
            if pairs(own, method, other) > 1:
                found.append((str(cell), outcome, method, other, difference(own, outcome, method, other)))
    corrected = holm([entry[-1].p for entry in found])
    return [(*entry, p) for entry, p in zip(found, corrected, strict=True)]


def difference_figure(rows: pd.DataFrame) -> Any:
    """Of every cell with pairs, SRPO's and SDPO's lead over GRPO in the first fifth of a run and at its end."""
    scores = outcomes(rows)
    compared = scores[~is_choice(scores)]
    cells = [cell for cell, own in compared.groupby("cell", sort=False) if pairs(own, "srpo", "grpo") > 1]
    methods: tuple[Method, ...] = ("srpo", "sdpo")
    with plt.rc_context(STYLE):
        size = (9, 1.4 + 0.42 * len(cells))
        figure, panels = plt.subplots(1, 2, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained")
        for panel, outcome, title in zip(panels[0], ("early", "end"), ("first fifth", "last fifth"), strict=True):
            for method, shift in zip(methods, (-0.14, 0.14), strict=True):
                shown = [
                    (place + shift, difference(own, outcome, method, "grpo"))
                    for place, cell in enumerate(cells)
                    if pairs(own := compared[compared["cell"] == cell], method, "grpo") > 1
                ]
                points = [100 * d.mean for _, d in shown]
                reach = [[100 * (d.mean - d.low) for _, d in shown], [100 * (d.high - d.mean) for _, d in shown]]
                places = [place for place, _ in shown]
                style = {"fmt": "o", "color": COLOURS[method], "markersize": 4, "label": f"{method} less grpo"}
                panel.errorbar(points, places, xerr=reach, **style)
            panel.axvline(0, color="black", linewidth=0.8)
            panel.set(title=title, xlabel="points of held-out accuracy, 95 % interval over pairs")
            panel.grid(alpha=0.25, axis="x")
        panels[0][0].set_yticks(range(len(cells)), cells)
        panels[0][0].set_ylim(len(cells) - 0.5, -0.5)
        legend_above(figure)
    return figure


def difference_table(rows: pd.DataFrame) -> str:
    """The primary comparisons, as Markdown."""
    found = primary_differences(rows)
    if not found:
        return _NOTHING
    lines = [
        {
            "cell": f"`{cell}`",
            "outcome": outcome,
            "difference": f"`{method}` less `{other}`",
            "points": f"{100 * d.mean:+.1f} ({100 * d.low:+.1f} to {100 * d.high:+.1f})",
            "pairs": d.pairs,
            "p": f"{d.p:.2g}",
            "p, Holm": f"{p:.2g}",
        }
        for cell, outcome, method, other, d, p in found
    ]
    return markdown_table(
        pd.DataFrame(lines),
        "Differences in points over pairs of the same seed, mean with its 95 % interval (Student's t), p of a paired "
        f"t-test and the same after Holm's correction for all {len(found)} comparisons of the table.",
    )


def choice_table(rows: pd.DataFrame) -> str:
    """Area under the accuracy curve by learning rate, on the seeds of the choice, as Markdown."""
    scores = outcomes(rows)
    chosen = scores[is_choice(scores)]
    lines = []
    for (cell, method), own in chosen.groupby(["cell", "method"], sort=False):
        mean = own.groupby("lr")["area"].mean()
        fallen = own.groupby("lr")["collapsed"].any()
        line = {"cell": f"`{cell}`", "method": f"`{method}`"}
        for place, (lr, area) in enumerate(mean.items(), 1):
            mark = "**" if lr == mean.idxmax() else ""
            line[f"rate {place}"] = f"{lr:g}: {mark}{100 * area:.1f}{mark}{' ↓' if fallen[lr] else ''}"
        lines.append(line)
    return markdown_table(
        pd.DataFrame(lines).fillna("-"),
        "Mean accuracy over a run in percent, by learning rate, on the seed of the choice. Bold: chosen; ↓: collapsed.",
    )


def cell_curves(rows: pd.DataFrame) -> Any:
    """A line of panels per cell: accuracy against steps at the chosen rates, and area against the learning rate."""
    scores = outcomes(rows)
    cells = list(dict.fromkeys(rows["cell"]))
    with plt.rc_context(STYLE):
        size = (9, 2.8 * len(cells))
        figure, panels = plt.subplots(len(cells), 2, figsize=size, squeeze=False, layout="constrained")
        for line, cell in zip(panels, cells, strict=True):
            own = rows[(rows["cell"] == cell) & ~is_choice(rows)]
            for method, runs in own.groupby("method", sort=False):
                band = runs.groupby("step")["accuracy"].apply(interval)
                band_line(line[0], band.index.to_numpy(), band, str(method), most=1)
            line[0].set(xlabel="step", title=f"{cell}: each at its own rate", ylabel="held-out accuracy")
            line[0].set_visible(not own.empty)
            _rates(line[1], scores[(scores["cell"] == cell) & is_choice(scores)])
            line[1].set(xlabel="learning rate", title=f"{cell}: its mean over a run", xscale="log")
            rates = sorted(scores.loc[(scores["cell"] == cell) & is_choice(scores), "lr"].unique())
            line[1].set_xticks(rates, [f"{rate:g}" for rate in rates])
            line[1].minorticks_off()
            for panel in line:
                panel.grid(alpha=0.25)
                panel.set_ylim(0, 1)
        legend_above(figure)
    return figure


def _rates(panel: Axes, scores: pd.DataFrame) -> None:
    for method, own in scores.groupby("method", sort=False):
        mean = own.groupby("lr")["area"].mean()
        panel.plot(mean.index, mean, "o-", color=COLOURS[method], label=method, markersize=3)


def mechanism_figure(rows: pd.DataFrame) -> Any:
    """A line of panels per first model: what both models hold around the first error, gradients there, and cosines.

    The cosines are also those of the trained models at the last step, in the colours of their methods.
    """
    cells = list(dict.fromkeys(rows["cell"]))
    with plt.rc_context(STYLE):
        size = (12, 3.2 * len(cells))
        figure, panels = plt.subplots(len(cells), 3, figsize=size, sharey="col", squeeze=False, layout="constrained")
        for (held, gradients, cosines), cell in zip(panels, cells, strict=True):
            own = rows[rows["cell"] == cell]
            start, last = own[own["method"] == "start"], own[own["step"] == own["step"].max()]
            for (name, kind), (label, colour, style) in _HELD.items():
                at = by_place(start[start["kind"] == kind], name)
                held.plot(PLACES, at, style, marker="o", color=colour, label=label)
            for method in ("srpo", "grpo"):
                at = by_place(start, f"gradient_{method}")
                gradients.plot(PLACES, at, "o-", color=COLOURS[method], label=method)
            for name, trained in last[last["method"] != "start"].groupby("method", sort=False):
                _cosines(cosines, trained, COLOURS[name], f"trained with {name}")
            _cosines(cosines, start, "black", "first model")
            held.set(ylabel=cell, title="probability, first model", ylim=(0, 1.02))
            gradients.set(title="gradient norm at a digit's logits, first model")
            cosines.axhline(0, color="black", linewidth=0.6)
            cosines.set(title="cosine with the supervised gradient")
            for panel in (held, gradients, cosines):
                panel.grid(alpha=0.25)
        panels[0][1].set_ylim(0, None)
        above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.1), "frameon": False}
        for column in panels.T:
            column[0].legend(**legend_entries(column), **above, fontsize=8, handlelength=3)
    return figure


def _cosines(panel: Axes, rows: pd.DataFrame, colour: str, label: str) -> None:
    whole = rows[rows["place"] == "reply"]
    panel.plot(list(_COSINES.values()), [whole[name].mean() for name in _COSINES], "o-", color=colour, label=label)


def mechanism_table(rows: pd.DataFrame) -> str:
    """Of the first models, and of every method's runs at every probed step, as Markdown."""
    lines = []
    for own in mechanism_means(rows).to_dict("records"):
        lines.append(
            {
                "cell": f"`{own['cell']}`",
                "trained with": f"`{own['method']}`, {own['step']} steps" if own["step"] else "-",
                "right alone, shown": f"{_percent(own['student_accuracy'])}, {_percent(own['teacher_accuracy'])}",
                "first error is copied": _percent(own["first_copied"]),
                "teacher: shown digit": _three(own, "teacher_shown_copied"),
                "teacher: consistent total": _three(own, "teacher_consistent_total"),
                "teacher: shown total": _three(own, "teacher_shown_total"),
                "share of the gradient": _three(own, "gradient_srpo"),
                "cosine": _three(own, "cosine_distillation"),
                "whole": _percent(own["cosine_distillation"]),
                "GRPO's": _percent(own["cosine_grpo"]),
                "norm": _percent(own["norm"]),
            }
        )
    return markdown_table(
        pd.DataFrame(lines),
        f"Means over {rows['seed'].nunique()} seeds in percent. Three numbers: {', '.join(_WHERE.values())}. Cosines "
        "are those with the gradient of the supervised loss on the right replies; norm: distillation's by GRPO's.",
    )


def _three(means: dict[Any, Any], name: str) -> str:
    return " / ".join(_percent(means[f"{name}_{place}"]) for place in PLACES)


def _percent(value: float) -> str:
    return "-" if pd.isna(value) else f"{100 * value:.0f}"
