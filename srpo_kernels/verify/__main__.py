from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from srpo_kernels.verify import timing, tuning
from srpo_kernels.verify.checks import Check
from srpo_kernels.verify.device_report.command import Job, write_report
from srpo_kernels.verify.machine import Machine, inspect
from srpo_kernels.verify.tasks import Task, determinism_tasks, parity_tasks

try:
    import tyro
    from rich.console import Console
    from rich.progress import Progress

    from srpo_kernels.verify import report
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"python -m srpo_kernels.verify needs the package {missing.name}: pip install srpo-kernels[verify]"
    ) from missing

# Columns of output that goes to a file.
_FILE_WIDTH = 140


@dataclass(frozen=True, kw_only=True)
class Options:
    """Check srpo_kernels on this machine: results, gradients, determinism; then time it beside plain torch.

    Every public function is run with every group of options, in every dtype, on every backend that is there, and held
    to plain torch in fp64 on the CPU. Exits with 1 where a check fails. With TRITON_INTERPRET=1 in the environment,
    the Triton kernels are checked on the CPU, in Triton's interpreter.
    """

    device: str | None = None
    """Where to run, as torch names it: cuda (AMD's too), xpu, mps, cpu. Default: the accelerator, or else the CPU."""
    backend: Literal["auto", "torch", "triton"] = "auto"
    """auto: every backend that can run on the device."""
    json: Path | None = None
    """File to write everything to; - is the standard output, and the tables go to the standard error."""
    only: tuple[str, ...] = ()
    """Checks whose function or group contains one of these, such as token_stats. Default: all."""
    quick: bool = False
    """One case of each group and policy loss, in fp32 and bf16."""
    full: bool = False
    """A current model's head in every dtype (else on an accelerator in bf16), and no smaller cases for the
    interpreter."""
    timing: bool = True
    """Measure time and memory of forward and backward too; --no-timing leaves that out."""
    report: Path | None = None
    """Folder for a whole report of the device in place of all this: parity, repeated runs, rates of matmuls and row
    passes, and whole steps beside every peer that is installed, as JSON and as Markdown. Goes on where it was ended."""
    minutes: float | None = None
    """Of --report: no section begins after that; 10 if not given."""
    sizes: Literal["gpu", "small"] | None = None
    """Of --report: small ones run on any machine. Default: small ones on a CPU."""
    retry: bool = False
    """Of --report: run sections that have failed again."""
    tune: Path | None = None
    """File of python -m tools.gate.launches whose launches of the kernels to time on a GPU, in place of all this."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = tyro.cli(
        Options,
        args=arguments,
        prog="python -m srpo_kernels.verify",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if options.quick and options.full:
        raise SystemExit("--quick and --full contradict each other")
    if options.tune is not None:
        return _tune(options, options.tune)
    if options.report is not None:
        return _report(options, options.report)
    if options.minutes is not None or options.sizes is not None or options.retry:
        raise SystemExit("--minutes, --sizes and --retry are options of --report")
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


def _report(options: Options, folder: Path) -> int:
    if options.json is not None or options.only or options.quick or options.full or not options.timing:
        raise SystemExit("--report has all sections: leave out --json, --only, --quick, --full and --no-timing")
    minutes = 10.0 if options.minutes is None else options.minutes
    job = Job(folder, options.device, options.backend, options.sizes, time.time() + 60.0 * minutes)
    return write_report(job, retry=options.retry)


def _tune(options: Options, path: Path) -> int:
    if options != Options(device=options.device, tune=path):
        raise SystemExit("--tune has no other option than --device")
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
    return [x for x in every if not options.only or any(y in x.case.op or y in x.case.group for y in options.only)]


if __name__ == "__main__":
    sys.exit(main())
