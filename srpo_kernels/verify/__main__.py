from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from srpo_kernels.verify import checks, timing
from srpo_kernels.verify.cases import cases
from srpo_kernels.verify.checks import Check
from srpo_kernels.verify.inputs import Case, Size
from srpo_kernels.verify.machine import Machine, inspect

try:
    import tyro
    from rich.console import Console
    from rich.progress import Progress

    from srpo_kernels.verify import report
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"python -m srpo_kernels.verify needs the package {missing.name}: pip install srpo-kernels[verify]"
    ) from missing

Task = Callable[[], Iterable[Check]]

# Columns of output that goes to a file.
_FILE_WIDTH = 140
# The interpreter takes some hundredths of a second per row and pass.
_INTERPRETED_SIZE = Size(4, 3, 67)
_SIZE = Size(6, 5, 1009)
_MANY_ROWS = Size(8, 64, 5003, 64)
# What the checks on the head of a current model need of an accelerator's memory.
_REALISTIC_BYTES = 8 << 30


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


def run(options: Options, console: Console) -> report.Outcome:
    """Everything that was asked for, with a progress bar on ``console``."""
    start = time.perf_counter()
    try:
        machine = inspect(options.device, options.backend)
    except RuntimeError as reason:
        raise SystemExit(f"--device {options.device}: {reason}") from reason
    report.print_machine(console, machine)
    found: list[Check] = []
    with Progress(console=console, transient=True) as progress, warnings.catch_warnings():
        # Its lanes beyond the vocabulary overflow, as they may.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")
        tasks = _tasks(machine, options)
        bar = progress.add_task("checks", total=len(tasks))
        for name, task in tasks:
            progress.update(bar, description=name)
            found += task()
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


def _tasks(machine: Machine, options: Options) -> list[tuple[str, Task]]:
    """Names and checks."""
    if not machine.backends:
        return []
    small = machine.interpreted and not options.full
    size = _INTERPRETED_SIZE if small else _SIZE
    realistic = machine.device.type != "cpu" and timing.free_bytes(machine.device) > _REALISTIC_BYTES
    chosen = cases(size, large=not options.quick, realistic=realistic and not options.quick)
    if options.quick:
        first = {(case.op, case.group, case.config.loss_type): case for case in reversed(chosen)}
        chosen = list(first.values())[::-1]
    tasks: list[tuple[str, Task]] = []
    for case in _selected(chosen, options.only):
        for dtype in machine.dtypes:
            backends = [x for x in machine.backends if _runs(case, x) and dtype in machine.dtypes_of(x)]
            if backends and _wanted(case, dtype, options):
                name = f"{case.op}, {case.group}: {case.name}"
                tasks.append((name, partial(checks.parity, case, dtype, backends, machine.device)))
    repeated = checks.determinism_cases(size if small else _MANY_ROWS)
    for case in _selected(repeated, options.only):
        for backend in machine.backends:
            for dtype in machine.dtypes_of(backend)[:2] if _runs(case, backend) else ():
                name = f"{case.op}, {case.group}: {case.name}"
                tasks.append((name, partial(checks.determinism, case, dtype, backend, machine.device)))
    return tasks


def _selected(every: list[Case], only: tuple[str, ...]) -> list[Case]:
    return [case for case in every if not only or any(x in case.op or x in case.group for x in only)]


def _runs(case: Case, backend: str) -> bool:
    """Whether a backend has the case's engine."""
    return case.engine != "tile" or backend == "triton"


def _wanted(case: Case, dtype: torch.dtype, options: Options) -> bool:
    """Whether a case is run in ``dtype``: truth takes seconds where the head is large."""
    if options.quick:
        return dtype in (torch.float32, torch.bfloat16)
    if case.realistic:
        return dtype == torch.bfloat16 or (options.full and dtype != torch.float64)
    return True


if __name__ == "__main__":
    sys.exit(main())
