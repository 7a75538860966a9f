"""Runs whose lines a CSV file keeps: what it has is not run again."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from rich.console import Console

from benchmarks.results import environment
from studies.learning.cells import KEY, Key, Run, Setting

SettingT = TypeVar("SettingT", bound=Setting)
# Where runs are made: the device, and the threads of a run.
Place = tuple[torch.device, int]


def run_missing(
    runs: Sequence[Run[SettingT]],
    train: Callable[[Run[SettingT]], tuple[pd.DataFrame, ...]],
    files: tuple[Path, ...],
    *,
    workers: int,
    place: Place,
    console: Console,
) -> None:
    """Train those that the first file does not have, ``workers`` at a time, and append each one's tables to ``files``.

    More than one at a time have a process each.
    """
    done = keys(files[0])
    todo = [planned for planned in runs if planned.key not in done]
    for ended, tables in _ended(todo, train, workers):
        for path, rows in zip(files, tables, strict=True):
            append(path, ended.key, rows, place)
        last, seconds = tables[0]["accuracy"].iloc[-1], tables[0]["train_seconds"].iloc[-1]
        console.print(f"{ended.cell.name} {ended.method} {ended.lr:g}, seed {ended.seed}: {last:.3f}, {seconds:.0f} s")


def _ended(
    runs: list[Run[SettingT]], train: Callable[[Run[SettingT]], tuple[pd.DataFrame, ...]], workers: int
) -> Iterator[tuple[Run[SettingT], tuple[pd.DataFrame, ...]]]:
    if workers == 1:
        yield from ((planned, train(planned)) for planned in runs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        futures = {pool.submit(train, planned): planned for planned in runs}
        try:
            yield from ((futures[future], future.result()) for future in as_completed(futures))
        except BaseException:
            pool.shutdown(cancel_futures=True, wait=False)
            raise


def keys(path: Path) -> set[tuple[Any, ...]]:
    """Of the runs that the file has."""
    if not path.exists():
        return set()
    return set(pd.read_csv(path)[list(KEY)].drop_duplicates().itertuples(index=False, name=None))


def append(path: Path, own: Key, rows: pd.DataFrame, place: Place) -> None:
    """Add a run's lines to the file, in place of those it may have; what it was run on stands in the first."""
    if rows.empty:
        return
    key = pd.DataFrame([own] * len(rows), columns=list(KEY))
    table = pd.concat([key, rows, pd.DataFrame([environment(*place)])], axis=1)
    before = pd.read_csv(path) if path.exists() else table.iloc[:0]
    others = before[before[list(KEY)].ne(key.iloc[0]).any(axis=1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.concat([others, table], ignore_index=True).to_csv(path, index=False, float_format="%.4g")
