"""Draw, judge, sum up."""

from __future__ import annotations

import time
import warnings
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import Progress

from tests.fuzz.draw import draw_case
from tests.fuzz.judge import judge
from tests.fuzz.report import Outcome, print_case, print_summary

if TYPE_CHECKING:
    from tests.fuzz.__main__ import Options

# Case seeds of one ``--seed``; those of another are others.
_SEEDS = 1_000_000


def fuzz(options: Options) -> int:
    """Everything that was asked for; the exit code."""
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
