"""What the runs of the cells say: outcomes of a run, chosen learning rates, and paired differences with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from studies.learning.cells import CHOICE_SEEDS, KEY, Run, SettingT

OUTCOMES = {"early": "area, first fifth", "end": "end", "best": "best", "area": "area"}
# A run that in two evaluations in a row has less than this share of its best before them has collapsed.
_KEPT = 2 / 3
# The comparisons that are corrected together, cell by cell: outcome, method, less the other.
PRIMARY = (
    ("early", "srpo", "grpo"),
    ("early", "sdpo", "grpo"),
    ("end", "srpo", "grpo"),
    ("end", "srpo", "sdpo"),
)
# Of a failed reply's tokens, around the first wrong one.
PLACES = ("before", "at", "after")


class Difference(NamedTuple):
    """Mean over pairs of the same seed, its 95 % interval, p of a paired t-test and that of Holm, and the pairs."""

    mean: float
    low: float
    high: float
    p: float
    pairs: int


def outcomes(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per run: ``area`` under the accuracy curve, divided by its steps, ``early``, that of the first fifth,
    ``end``, the mean of the last fifth, ``best``, of all evaluations, and ``collapsed``.
    """
    lines = []
    for key, run in rows.groupby(list(KEY), sort=False):
        step, accuracy = run["step"].to_numpy(), run["accuracy"].to_numpy()
        early, late = step <= step[-1] / 5, step > 0.8 * step[-1]
        low = accuracy < _KEPT * np.maximum.accumulate(accuracy)
        lines.append(
            dict(zip(KEY, key, strict=True))
            | {
                "start": accuracy[0],
                "area": _area(step, accuracy),
                "early": _area(step[early], accuracy[early]),
                "end": accuracy[late].mean(),
                "best": accuracy.max(),
                "collapsed": bool((low[1:] & low[:-1]).any()),
            }
        )
    return pd.DataFrame(lines)


def _area(step: Any, accuracy: Any) -> float:
    """Divided by the steps; one evaluation alone is its own mean."""
    if len(step) == 1:
        return float(accuracy[0])
    return float(np.trapezoid(accuracy, step) / (step[-1] - step[0]))


def is_choice(rows: pd.DataFrame) -> pd.Series:
    """The runs that chose a learning rate; all others are compared."""
    return rows["seed"].isin(CHOICE_SEEDS)


def chosen_lr(scores: pd.DataFrame, cell: str, method: str) -> float:
    """The learning rate with the greatest mean area over the seeds of the choice."""
    own = scores[is_choice(scores) & (scores["cell"] == cell) & (scores["method"] == method)]
    return float(own.groupby("lr")["area"].mean().idxmax())


def with_chosen_lr(runs: Sequence[Run[SettingT]], path: Path) -> list[Run[SettingT]]:
    """The runs, each with the learning rate that its method's choice in the CSV file has shown to be best."""
    scores = outcomes(pd.read_csv(path))
    return [planned._replace(lr=chosen_lr(scores, planned.cell.name, planned.method)) for planned in runs]


def difference(scores: pd.DataFrame, outcome: str, method: str, other: str) -> Difference:
    """Of one cell's compared runs: ``method`` less ``other``, over the seeds that both have."""
    table = scores.pivot(index="seed", columns="method", values=outcome)[[method, other]].dropna()
    gaps = table[method] - table[other]
    test = stats.ttest_rel(table[method], table[other])
    low, high = test.confidence_interval(0.95)
    return Difference(float(gaps.mean()), float(low), float(high), float(test.pvalue), len(gaps))


def pairs(compared: pd.DataFrame, method: str, other: str) -> int:
    """Seeds of a cell that both methods have."""
    return len(set.intersection(*(set(compared.loc[compared["method"] == name, "seed"]) for name in (method, other))))


def holm(p: list[float]) -> list[float]:
    """p-values of Holm's step-down correction."""
    order = np.argsort(p)
    corrected = np.empty(len(p))
    corrected[order] = np.maximum.accumulate(np.asarray(p)[order] * (len(p) - np.arange(len(p)))).clip(max=1.0)
    return corrected.tolist()


def mechanism_means(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per cell, method and probed step: means over runs of what the probe has seen, and shares of places."""
    lines = []
    for key, own in rows.groupby(["cell", "method", "step"], sort=False):
        whole, digits = own[own["place"] == "reply"], own[own["place"] != "reply"]
        first = digits.loc[digits["place"] == "at"].groupby("kind")["tokens"].sum()
        mass = (digits["gradient_srpo"] * digits["tokens"]).groupby(digits["place"]).sum().reindex(PLACES)
        line = dict(zip(("cell", "method", "step"), key, strict=True))
        line |= {name: whole[name].mean() for name in ("student_accuracy", "teacher_accuracy")}
        line |= {f"first_{kind}": first.get(kind, 0) / first.sum() for kind in ("copied", "total")}
        for name, kind in (("teacher_shown", "copied"), ("teacher_consistent", "total"), ("teacher_shown", "total")):
            means = by_place(digits[digits["kind"] == kind], name)
            line |= {f"{name}_{kind}_{place}": mean for place, mean in zip(PLACES, means, strict=True)}
        line |= {f"gradient_srpo_{place}": mass[place] / mass.sum() for place in PLACES}
        cosines = (*(f"cosine_distillation_{place}" for place in PLACES), "cosine_distillation", "cosine_grpo")
        line |= {name: whole[name].mean() for name in cosines}
        lines.append(line | {"norm": (whole["norm_distillation"] / whole["norm_grpo"]).mean()})
    return pd.DataFrame(lines)


def by_place(rows: pd.DataFrame, name: str) -> list[float]:
    """Means over runs before the first wrong token, at it and after it, weighted by their tokens."""
    values = []
    for place in PLACES:
        own = rows[rows["place"] == place]
        values.append(float((own[name] * own["tokens"]).sum() / own["tokens"].sum()) if len(own) else float("nan"))
    return values
