"""Every method and seed, in processes that share the work; what was done once is not done again."""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from queue import Queue
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.results import environment
from studies.learning.base import held_out_accuracies, load_base, make_model, teach
from studies.learning.options import Method, Recipe, Study
from studies.learning.policy_optimization import run
from studies.learning.tasks import Family

_BASE = "base"


def study(options: Study) -> None:
    """What ``Study`` describes."""
    torch.set_num_threads(1)
    folder, families, base, recipe = options.folder, options.families, options.base, options.recipe
    folder.mkdir(parents=True, exist_ok=True)
    _same_settings(folder / "settings.json", {"families": families, "base": asdict(base), "recipe": asdict(recipe)})
    console = Console(soft_wrap=True)
    if not (folder / _BASE).exists():
        model = make_model(base.hidden_size, base.layers, seed=0)
        count = sum(parameter.numel() for parameter in model.parameters())
        console.print(f"supervised training of {count / 1e6:.1f} M parameters")

        def show(step: int) -> bool:
            accuracy = held_out_accuracies(model, families, 64, 4)
            console.print(f"{step:6d} steps: {', '.join(f'{name} {value:.2f}' for name, value in accuracy.items())}")
            return False

        teach(
            model,
            families,
            steps=base.steps,
            lr=base.lr,
            seed=0,
            shown=base.shown,
            evaluate_every=100,
            progress=show,
        )
        model.save_pretrained(folder / _BASE)
    runs = [(method, seed) for seed in range(options.seeds) for method in options.methods]
    todo = [key for key in runs if not _finished(_file(folder, *key), recipe.steps)]
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, _progress(console) as progress:
        total, done = len(runs) * recipe.steps, (len(runs) - len(todo)) * recipe.steps
        bar = progress.add_task("runs", total=total, completed=done)
        told = manager.Queue()
        with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
            futures = [pool.submit(_train, folder, *key, families, recipe, told) for key in todo]
            try:
                pending = set(futures)
                while pending:
                    _, pending = wait(pending, timeout=1.0, return_when=FIRST_EXCEPTION)
                    for future in futures:
                        if future.done():
                            future.result()
                    while not told.empty():
                        name, steps, accuracy, last = told.get()
                        progress.update(bar, advance=steps)
                        if last:
                            progress.console.print(f"{name}: accuracy {accuracy:.3f}")
                            collect(folder, runs, recipe.steps, options.out)
            except BaseException:
                pool.shutdown(cancel_futures=True, wait=False)
                raise
    collect(folder, runs, recipe.steps, options.out)
    console.print(f"{len(runs)} runs: {options.out}")


def collect(folder: Path, runs: list[tuple[Method, int]], steps: int, out: Path) -> None:
    """Join the finished runs into one CSV file, with what they were run on."""
    finished = [key for key in runs if _finished(_file(folder, *key), steps)]
    if not finished:
        return
    parts = [pd.read_csv(_file(folder, *key)).assign(method=key[0], seed=key[1]) for key in finished]
    cells = pd.concat(parts, ignore_index=True)
    front = ["method", "seed", "step"]
    cells = cells[front + [name for name in cells.columns if name not in front]]
    out.parent.mkdir(parents=True, exist_ok=True)
    cells.assign(**environment(torch.device("cpu"), 1)).to_csv(out, index=False, float_format="%.5g")


def _train(
    folder: Path, method: Method, seed: int, families: tuple[Family, ...], recipe: Recipe, told: Queue[Any]
) -> None:
    torch.set_num_threads(1)
    rows: list[dict[str, float]] = []
    before = 0.0
    for row in run(load_base(folder / _BASE), method, seed, families, recipe):
        rows.append(row)
        pd.DataFrame(rows).to_csv(_file(folder, method, seed), index=False)
        told.put((f"{method}, seed {seed}", row["step"] - before, row["accuracy"], row["step"] == recipe.steps))
        before = row["step"]


def _file(folder: Path, method: Method, seed: int) -> Path:
    return folder / f"{method}-{seed}.csv"


def _finished(file: Path, steps: int) -> bool:
    return file.exists() and int(pd.read_csv(file)["step"].max()) == steps


def _same_settings(file: Path, settings: dict[str, Any]) -> None:
    """Runs of other settings are no part of this study."""
    text = json.dumps(settings, indent=1)
    if not file.exists():
        file.write_text(text)
    elif file.read_text() != text:
        raise SystemExit(f"{file} is of a study with other settings: give another --folder")


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps")
    return Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console)
