"""What ``python -m srpo_kernels.verify`` does once it has its options."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import Progress

from srpo_kernels.verify import report, timing, tuning
from srpo_kernels.verify.checks import Check
from srpo_kernels.verify.device_report.command import Job, write_report
from srpo_kernels.verify.inputs import Case
from srpo_kernels.verify.machine import Machine, inspect
from srpo_kernels.verify.tasks import Task, determinism_tasks, parity_tasks

if TYPE_CHECKING:
    from srpo_kernels.verify.__main__ import Options

# Columns of output that goes to a file.
_FILE_WIDTH = 140


def verify(options: Options) -> int:
    """Check, time and print; the exit code."""
    to_stdout = options.json is not None and str(options.json) == "-"
    console = Console(stderr=to_stdout, highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    outcome = run(options, console)
    report.print_outcome(console, outcome)
    if options.json is not None:
        text = json.dumps(report.as_json(outcome), indent=1, allow_nan=False)
        if to_stdout:
            print(text)
        else:
            options.json.write_text(text + "\n")
    return 0 if outcome.passed else 1


def report_device(options: Options, folder: Path) -> int:
    """Write the whole report of the device; the exit code."""
    minutes = 10.0 if options.minutes is None else options.minutes
    job = Job(folder, options.device, options.backend, options.sizes, time.time() + 60.0 * minutes)
    return write_report(job, retry=options.retry)


def tune_launches(options: Options, path: Path) -> int:
    """Time the launches of a file; the exit code."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    machine = _machine(options)
    if machine.interpreted or "triton" not in machine.backends:
        raise SystemExit(
            f"--tune needs a GPU that Triton compiles for, and no interpreter: there is {machine.device_name}"
        )
    try:
        choices = tuning.read_choices(path, tuning.target_of(machine.device))
    except ValueError as error:
        raise SystemExit(str(error)) from error
    report.print_tuned(console, list(tuning.tune(choices, machine.device, tuning.Size())))
    return 0


def _machine(options: Options) -> Machine:
    try:
        return inspect(options.device, options.backend)
    except RuntimeError as reason:
        raise SystemExit(f"--device {options.device}: {reason}") from reason


def run(options: Options, console: Console) -> report.Outcome:
    """Everything that was asked for, with a progress bar on ``console``."""
    start = time.perf_counter()
    machine = _machine(options)
    report.print_machine(console, machine)
    found: list[Check] = []
    with Progress(console=console, transient=True) as progress, warnings.catch_warnings():
        # Its lanes beyond the vocabulary overflow, as they may.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")
        tasks = _tasks(machine, options)
        bar = progress.add_task("checks", total=len(tasks))
        for task in tasks:
            progress.update(bar, description=task.name)
            found += task.run()
            progress.advance(bar)
        shape, skipped, timings = None, _no_timing(machine, options), []
        if skipped is None:
            shape = timing.shape_for(machine.device, machine.dtypes)
            bar = progress.add_task("timing", total=len(timing.WORKLOADS) * (1 + len(machine.backends)))
            for measured in timing.measure(machine.device, shape, machine.backends):
                timings.append(measured)
                progress.advance(bar)
    return report.Outcome(machine, found, shape, timings, skipped, time.perf_counter() - start)


def _no_timing(machine: Machine, options: Options) -> str | None:
    """Why nothing is timed."""
    if not options.timing:
        return "not asked for"
    if machine.interpreted:
        return "Triton runs in its interpreter, whose speed says nothing; run without TRITON_INTERPRET"
    return None if machine.backends else "there is no backend"


def _tasks(machine: Machine, options: Options) -> list[Task]:
    parity = parity_tasks(machine, quick=options.quick, full=options.full)
    if options.quick:
        parity = [task for task in parity if task.dtype in (torch.float32, torch.bfloat16)]
    every = [*parity, *determinism_tasks(machine, full=options.full)]
    return [x for x in every if not options.only or any(_is_meant(x.case, part) for part in options.only)]


def _is_meant(case: Case, part: str) -> bool:
    return part in case.op or part in case.group or part == case.name
