"""The command line: draw, judge, sum up."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.progress import Progress

from tests.fuzz.draw import draw_case
from tests.fuzz.judge import judge
from tests.fuzz.report import Outcome, print_case, print_summary

# Case seeds of one ``--seed``; those of another are others.
_SEEDS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Options:
    """Hold random calls of the public functions to the fp64 oracle: values, metrics and gradients.

    Every case is a function of one integer, its seed, which is printed with all of its options where something is off
    by more than rounding explains; --only repeats it. Exits with 1 where a case fails.
    """

    backend: Literal["torch", "triton"] = "torch"
    """triton: in Triton's interpreter, where there is no GPU."""
    cases: int = 3000
    seed: int = 0
    """Of the whole run: its cases have the seeds from a million times this on."""
    only: int | None = None
    """Seed of one case, to repeat it."""
    show: int = 20
    """How many of the failures are printed in full."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = tyro.cli(Options, args=arguments, prog="python -m tests.fuzz")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140
    torch.set_num_threads(1)
    first = options.seed * _SEEDS
    seeds = range(first, first + options.cases) if options.only is None else [options.only]
    outcomes, start = [], time.perf_counter()
    with Progress(console=console, transient=True) as progress, warnings.catch_warnings():
        # Lanes beyond the vocabulary overflow, as they may.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")
        bar = progress.add_task(f"{options.backend}, seed {options.seed}", total=len(seeds))
        failures = 0
        for seed in seeds:
            case = draw_case(seed, options.backend)
            outcome = Outcome(seed, case.options, judge(case))
            outcomes.append(outcome)
            failures += not outcome.passed
            if options.only is not None or (not outcome.passed and failures <= options.show):
                print_case(console, outcome)
            progress.advance(bar)
    print_summary(console, outcomes, options.backend, time.perf_counter() - start)
    return 1 if failures else 0
