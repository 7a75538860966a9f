"""A training step in TRL: SRPOTrainer beside TRL's own trainers, on the same model and the same completions."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from rich.console import Console

from benchmarks.options import Branch, Sizes, Trainers
from benchmarks.processes import fresh_peak
from benchmarks.results import (
    Measurement,
    ResultsFile,
    describe_environment,
    read_csv,
    resolve_device,
    resolve_threads,
    single,
)
from srpo_kernels.verify.agreement import relative_error
from srpo_kernels.verify.kinds import DtypeName
from srpo_kernels.verify.rounds import Rounds, interleave, quantiles
from tools.documents import print_table, rich_table

Side = Literal["srpo_kernels", "trl"]
SIDES: tuple[Side, Side] = ("srpo_kernels", "trl")

# Trainers that differ more than rounding explains do not compute the same thing. A model in bf16 has gradients that are
# themselves a quarter away from those in fp32: 0.22 to 0.28 of a Llama of 8 layers, with TRL's trainers as with ours.
_AGREEMENT: dict[DtypeName, float] = {"float32": 1e-3, "bfloat16": 0.3}
_TRAINERS: dict[Branch, str] = {"grpo": "GRPOTrainer", "sdpo": "SDPOTrainer"}


@dataclass(frozen=True)
class Step:
    """What is trained, on groups of which the share ``silent`` has no correct completion and each other one has one."""

    branch: Branch
    silent: float = 0.0
    sizes: Sizes = Trainers.sizes
    dtype: DtypeName = "float32"
    """Of the model's weights."""
    device: str = "cpu"

    @property
    def labels(self) -> dict[str, object]:
        """What names it in a file."""
        return {"branch": self.branch, "silent": self.silent, **asdict(self.sizes), "dtype": self.dtype}

    def completion(self, index: int) -> list[int]:
        """Token ids of completion ``index``; the last one ends it."""
        draw, sizes = random.Random(index), self.sizes
        return [*(draw.randrange(3, sizes.vocab) for _ in range(draw.randint(sizes.length // 2, sizes.length) - 1)), 1]

    def reward(self, index: int) -> float:
        """Of completion ``index``: 1 if it is correct, else 0."""
        group, member = divmod(index, self.sizes.group)
        return float(member == 0 and group < self.sizes.groups - round(self.silent * self.sizes.groups))


def trainers(options: Trainers) -> None:
    """What ``Trainers`` describes."""
    if options.rounds < 1:
        raise SystemExit(f"rounds must be >= 1, got {options.rounds}")
    threads = resolve_threads(options.threads)
    console = Console()
    where = resolve_device(options.device)
    file = ResultsFile(options.out, where, threads, resume=options.resume)
    steps = [
        Step(branch, share, options.sizes, options.dtype, where.type)
        for branch in options.branches
        for share in options.silent
    ]
    for step in file.missing(steps):
        with console.status(f"{step.branch}, {step.silent:.0%} silent"):
            file.add(list(_measure(step, options.rounds, threads, options.memory)))
    cells, caption = table(read_csv(options.out))
    print_table(console, rich_table(cells, "a training step", caption))


def _measure(step: Step, rounds: int, threads: int, memory: bool) -> Iterator[Measurement[Step]]:
    # The other sub-commands do without TRL.
    from benchmarks.trl_steps import extra_device_bytes, measure_peak, prepare

    with tempfile.TemporaryDirectory() as folder:
        steps = {side: prepare(side, step, Path(folder)) for side in SIDES}
        error = relative_error(*(steps[side]() for side in SIDES))
        if not error < _AGREEMENT[step.dtype]:
            raise RuntimeError(f"the trainers do not compute the same gradient of {step}: {error:.1e} apart")
        seconds = interleave(steps, Rounds(rounds, math.inf), torch.device(step.device), lambda what: None)
        on_device = {} if step.device == "cpu" else {side: extra_device_bytes(steps[side]) for side in SIDES}
        # The processes that measure memory need the room.
        del steps
    for side in SIDES:
        yield Measurement(step, side, "seconds", quantiles(seconds[side]))
        if memory and on_device:
            yield Measurement(step, side, "peak_bytes", single(on_device[side]))
        elif memory:
            yield from fresh_peak(step, side, measure_peak, side, step, threads)


def table(cells: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The numbers of ``trainers.csv``, a line per step, and what they are."""
    lines = []
    for step, medians in _by_step(cells):
        line = {
            "trainer": f"{_TRAINERS[step['branch']]}, {step['groups']} × {step['group']} completions",
            "groups without a correct one": f"{step['silent']:.0%}",
        }
        for metric, label, unit in (("seconds", "seconds", 1.0), ("peak_bytes", "MiB", 2.0**20)):
            if metric in medians:
                ours, theirs = (medians[metric][side] / unit for side in SIDES)
                form = ",.0f" if metric == "peak_bytes" else ".2f" if theirs >= 1.0 else ".3f"
                line |= {f"its {label}": f"{theirs:{form}}"}
                line |= {f"SRPOTrainer's {label}": f"{ours:{form}} ({ours / theirs:.2f}×)"}
        lines.append(line)
    first = cells.iloc[0]
    caption = (
        "One training step after generation, without the optimizer, and its extra peak memory: a Llama of "
        f"{first['layers']} layers, {first['hidden']:,} × {first['vocab']:,}, completions of {first['length'] // 2} to "
        f"{first['length']} tokens, {first['dtype']}, medians. Measured on {describe_environment(cells)}."
    )
    return pd.DataFrame(lines), caption


def _by_step(cells: pd.DataFrame) -> Iterator[tuple[pd.Series, dict[str, pd.Series]]]:
    """The labels of every step, and the medians of each metric that both sides have."""
    for _, group in cells.groupby(list(Step("grpo").labels), sort=False):
        medians = group.pivot(index="provider", columns="metric", values="median").dropna(axis="columns")
        yield group.iloc[0], {metric: medians[metric] for metric in ("seconds", "peak_bytes") if metric in medians}
