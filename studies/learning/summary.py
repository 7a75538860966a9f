"""The statistics that the prose of documents has, as rows of a CSV file to which `docs/numbers.toml` refers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import pandas as pd

from studies.learning import analysis
from studies.learning.cell_report import primary_differences
from studies.learning.comparison import difference, is_choice, mechanism_means, outcomes, pairs

_FIRST_STUDY = "first study"
_COLUMNS = ("cell", "method", "less", "step", "lr", "statistic", "mean", "low", "high", "p", "holm")
_OUTCOMES = ("start", "early", "end", "best", "area")
_COMPARED = ("early", "end", "area")
# Of the first study: means over the last fifth, and at these steps. A run without a teacher has no entropy of one.
_LOGGED = ("teacher_entropy", "mixed_groups", "sdpo_rollouts")
_EARLY_STEPS = (10, 100)
Row = dict[str, Any]


def write(rows: Iterable[Row], path: Path) -> None:
    """Rows of ``study_rows``, ``cell_rows`` and ``mechanism_rows`` as CSV, without those of what does not occur."""
    table = pd.DataFrame(rows, columns=list(_COLUMNS)).dropna(subset="mean")
    table.to_csv(path, index=False, float_format="%.5g")


def cell_rows(rows: pd.DataFrame) -> Iterator[Row]:
    """Of the compared runs of a cell: outcomes, median seconds and differences; of those of the choice: areas."""
    scores = outcomes(rows)
    chosen, compared = scores[is_choice(scores)], scores[~is_choice(scores)]
    seconds = rows[~is_choice(rows)].groupby(["cell", "method", "seed"])["train_seconds"].max()
    corrected = {found[:4]: found[-1] for found in primary_differences(rows)}
    for (cell, method, lr), own in chosen.groupby(["cell", "method", "lr"], sort=False):
        yield {"cell": cell, "method": method, "lr": lr, "statistic": "choice", "mean": own["area"].mean()}
    for (cell, method, lr), own in compared.groupby(["cell", "method", "lr"], sort=False):
        key = {"cell": cell, "method": method, "lr": lr}
        for outcome in _OUTCOMES:
            yield key | {"statistic": outcome} | _interval(own[outcome])
        yield key | {"statistic": "collapsed", "mean": own["collapsed"].sum()}
        yield key | {"statistic": "median_seconds", "mean": seconds[cell, method].median()}
    for cell, own in compared.groupby("cell", sort=False):
        for method, other in permutations(own["method"].unique(), 2):
            if pairs(own, method, other) > 1:
                for outcome in _COMPARED:
                    key = {"cell": cell, "method": method, "less": other, "statistic": outcome}
                    holm = corrected.get((cell, outcome, method, other))
                    yield key | difference(own, outcome, method, other)._asdict() | {"holm": holm}


def mechanism_rows(rows: pd.DataFrame) -> Iterator[Row]:
    """What ``mechanism_means`` has, a row per number."""
    for means in mechanism_means(rows).to_dict("records"):
        key = {name: means.pop(name) for name in ("cell", "method", "step")}
        for name, mean in means.items():
            yield key | {"statistic": name, "mean": mean}


def study_rows(runs: pd.DataFrame, scores: pd.DataFrame) -> Iterator[Row]:
    """Of the first study: stages with their differences, median seconds a step, and what was logged."""
    last = 0.8 * runs["step"].max()
    yield {"cell": _FIRST_STUDY, "statistic": "start", "mean": runs.loc[runs["step"] == 0, "accuracy"].mean()}
    for method, own in scores.groupby("method", sort=False):
        key, logged = {"cell": _FIRST_STUDY, "method": method}, runs[runs["method"] == method]
        for stage in own.columns.drop(["method", "seed"]):
            yield key | {"statistic": stage} | _interval(own[stage])
            if method != "srpo":
                found = zip(("mean", "low", "high", "p"), analysis.differences(scores, stage, str(method)), strict=True)
                yield {"cell": _FIRST_STUDY, "method": "srpo", "less": method, "statistic": stage} | dict(found)
        yield key | {"statistic": "median_seconds_per_step", "mean": logged["seconds_per_step"].median()}
        for name in logged.columns.intersection(_LOGGED):
            yield key | {"statistic": name, "mean": logged.loc[logged["step"] > last, name].mean()}
            for step in _EARLY_STEPS:
                yield key | {"statistic": name, "step": step, "mean": logged.loc[logged["step"] == step, name].mean()}


def _interval(values: pd.Series) -> Row:
    mean, half = analysis.interval(values)
    return {"mean": mean, "low": mean - half, "high": mean + half}
