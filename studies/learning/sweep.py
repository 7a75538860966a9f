"""Runs the cells in their order; what the CSV file has is not run again."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import torch
from rich.console import Console

from studies.learning.base import held_out_accuracies, load_base, make_model, teach
from studies.learning.cells import PLAN, STARTS, Cell, Run, choice_runs, comparison_runs
from studies.learning.comparison import with_chosen_lr
from studies.learning.mechanism import PROBED_SEEDS, Probe
from studies.learning.options import Sweep
from studies.learning.policy_optimization import run
from studies.learning.runs import append, keys, run_missing
from studies.learning.tasks import Family

_HIDDEN_SIZE, _LAYERS = 64, 2
_TEACH_STEPS, _TEACH_LR = 20_000, 1e-3
# The held-out accuracy at which a length is left for the next one, a start like the others.
_TAUGHT = 0.8
# What a start has to reach with a solution shown: a teacher that cannot use one is another study's subject.
_SHOWN = 0.9
# Of the interval in which the level of noise is sought.
_HALVINGS = 8
_PLACE = (torch.device("cpu"), 1)


def sweep(options: Sweep) -> None:
    """What ``Sweep`` describes."""
    only, folder, out, mechanism = options.only, options.folder, options.out, options.mechanism
    names = [stage.cell.name for stage in PLAN]
    if only is not None and only not in names:
        raise SystemExit(f"--only {only}: no such cell, there are {', '.join(names)}")
    torch.set_num_threads(1)
    console = Console(soft_wrap=True)
    train_missing = partial(
        run_missing,
        train=partial(train, folder),
        files=(out, mechanism),
        workers=options.workers,
        place=_PLACE,
        console=console,
    )
    for stage in PLAN:
        if only in (None, stage.cell.name):
            _first_model(folder, stage.cell, console)
            if _is_probed(stage.cell):
                _probe_start(folder, stage.cell, mechanism)
            train_missing(choice_runs(stage))
            train_missing(with_chosen_lr(comparison_runs(stage), out))


def train(folder: Path, planned: Run[Cell]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One run: what its evaluations have seen, and what the probe of the mechanism has."""
    torch.set_num_threads(1)
    cell, probe = planned.cell, Probe(planned.cell.family, planned.seed)
    assert planned.lr is not None
    recipe = cell.recipe(planned.lr)
    probed = {"watch": probe} if _is_probed(cell) and planned.seed < PROBED_SEEDS else {}
    base = load_base(folder / cell.first_model)
    rows = list(run(base, planned.method, planned.seed, (cell.family,), recipe, **probed))
    return pd.DataFrame(rows).drop(columns=f"accuracy_{cell.family}"), pd.DataFrame(probe.rows)


def _first_model(folder: Path, cell: Cell, console: Console) -> None:
    """Keep the cell's first model in the folder, where it is not there."""
    if (folder / cell.first_model).exists():
        return
    _teach(folder, cell.family, console)
    if not cell.noise:
        return
    taught, levels = folder / _stopped(cell.family, _TAUGHT), [0.0, 1.0]
    for _ in range(_HALVINGS):
        level = sum(levels) / 2
        model = noisy(load_base(taught), level)
        seen = held_out_accuracies(model, (cell.family,), 256, 1)[cell.family]
        console.print(f"noise of {level:.4f}: {cell.family} {seen:.2f}")
        levels[seen < cell.start] = level
    model.save_pretrained(folder / cell.first_model)


def noisy(model: Any, level: float) -> Any:
    """Add to every matrix normal noise of ``level`` times its own standard deviation, the same draws for any level."""
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight += level * weight.std() * torch.randn(weight.shape, generator=source)
    return model


def _teach(folder: Path, longest: Family, console: Console) -> None:
    """Supervised training of a task from its shortest length on, kept where a length first passes each start."""
    kind = longest.partition("-")[0]
    lengths: list[Family] = [name for name in get_args(Family) if name.startswith(kind)]
    model = make_model(_HIDDEN_SIZE, _LAYERS, seed=0)
    for family in lengths[: lengths.index(longest) + 1]:
        taught = folder / _stopped(family, _TAUGHT)
        if taught.exists():
            model = load_base(taught)
            continue

        def progress(step: int, model: Any = model, family: Family = family, taught: Path = taught) -> bool:
            seen = held_out_accuracies(model, (family,), 128, 1)
            console.print(f"{step:6d} steps: {', '.join(f'{name} {value:.2f}' for name, value in seen.items())}")
            for start in (*STARTS, _TAUGHT):
                path = folder / _stopped(family, start)
                if seen[family] >= start and seen[f"{family} shown"] >= _SHOWN and not path.exists():
                    model.save_pretrained(path)
            return taught.exists()

        teach(
            model,
            (family,),
            steps=_TEACH_STEPS,
            lr=_TEACH_LR,
            seed=0,
            shown=0.5,
            # No cell starts from the shortest.
            evaluate_every=50 if family.endswith("-3") else 10,
            progress=progress,
        )


def _stopped(family: Family, start: float) -> str:
    return Cell(family, start, (), noise=False).first_model


def _probe_start(folder: Path, cell: Cell, mechanism: Path) -> None:
    """What the first model does, with itself as the teacher: lines of a method ``start``, without a learning rate."""
    for seed in range(PROBED_SEEDS):
        key = cell.name, "start", seed, 0.0
        if key not in keys(mechanism):
            base, probe = load_base(folder / cell.first_model).eval(), Probe(cell.family, seed)
            probe(0, base, base)
            append(mechanism, key, pd.DataFrame(probe.rows), _PLACE)


def _is_probed(cell: Cell) -> bool:
    """Where replies go wrong is known of chains: they have one correct reply. Their first models are probed once."""
    return cell.family.startswith("chain") and cell.name == cell.first_model
