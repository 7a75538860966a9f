"""What was found, as tables and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from srpo_kernels.verify.checks import Check, dtype_name
from srpo_kernels.verify.machine import Machine
from srpo_kernels.verify.timing import PLAIN, WORKLOADS, Shape, Timing
from srpo_kernels.verify.tuning import Tuned

_RULE = (
    "Worst error over allowed error; up to 1 holds. Allowed: twice the error of plain torch with fp32 logits, and a "
    "few fp32 roundings (fp64: 1e-9), of gradients also those of dlogits in bf16. Errors are from plain "
    "torch in fp64 on the CPU."
)
# A broken kernel breaks hundreds of checks in the same way.
_MOST_FAILURES = 20


@dataclass(frozen=True)
class Outcome:
    """All that was found; ``no_timing`` says why nothing was timed."""

    machine: Machine
    checks: list[Check]
    shape: Shape | None
    timings: list[Timing]
    no_timing: str | None
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether something was checked and all of it held."""
        return bool(self.checks) and not self.failures

    @property
    def failures(self) -> list[str]:
        """A line for everything that did not hold."""
        broken = [_failure(check) for check in self.checks if not check.passed]
        return broken + [f"timing, {x.workload}, {x.implementation}: {x.note}" for x in self.timings if x.failed]


def print_machine(console: Console, machine: Machine) -> None:
    """What is verified, and what is not there."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("device", f"{machine.device}: {escape(machine.device_name)}")
    table.add_row("versions", ", ".join(f"{name} {version}" for name, version in machine.versions.items()))
    present = [f"{x} (interpreted)" if x == "triton" and machine.interpreted else x for x in machine.backends]
    table.add_row("backends", ", ".join(present) or "none")
    table.add_row("dtypes", ", ".join(map(dtype_name, machine.dtypes)) or "none")
    for name, products in machine.products.items():
        table.add_row(f"{name} products", escape(products))
    for name, reason in machine.absent.items():
        table.add_row(f"no {name}", escape(reason))
    if machine.interpreted:
        table.add_row("cases", "small ones, if not --full; the interpreter rounds a multiply-add twice, a GPU once")
    console.print(table)


def print_outcome(console: Console, outcome: Outcome) -> None:
    """The tables, whatever failed, and the verdict as the last line."""
    machine_products = outcome.machine.products
    for backend in outcome.machine.backends:
        found = [check for check in outcome.checks if check.backend == backend]
        parity = [check for check in found if check.kind == "parity"]
        if parity:
            rounded = machine_products.get("fp32", "fp32") != "fp32"
            console.print(_parity_table(backend, parity, "fp32 (TF32)" if rounded else "fp32"))
        for line in _determinism_lines([check for check in found if check.kind == "determinism"]):
            console.print(line)
    if outcome.shape is None:
        console.print(f"[dim]no timing: {escape(outcome.no_timing or '')}")
    else:
        console.print(_timing_table(outcome.shape, outcome.timings))
    failures = outcome.failures
    for failure in failures[:_MOST_FAILURES]:
        console.print(f"[red]✗ {escape(failure)}", soft_wrap=True)
    if len(failures) > _MOST_FAILURES:
        console.print(f"[red]and {len(failures) - _MOST_FAILURES} more, all of them in --json")
    console.print(_verdict(outcome), soft_wrap=True)


def print_tuned(console: Console, tuned: Sequence[Tuned]) -> None:
    """A table for the rows of each number of models, and one for their tiles: rates as multiples of the engine's."""
    for of, group in groupby(tuned, lambda x: x.of):
        launches = list(group)
        own = next((x.rate for x in launches if x.chosen), None)
        unit, scale = ("GB/s", 1e9) if of.startswith("rows") else ("TFLOP/s", 1e12)
        table = Table(title=of, box=box.SIMPLE_HEAD)
        for column in ("launch", "time on paper", unit, "of the engine's"):
            table.add_column(column)
        for x in sorted(launches, key=lambda x: -(x.rate or 0.0)):
            name = f"{x.launch} (the engine's)" if x.chosen else x.launch
            rate = "–" if x.rate is None else f"{x.rate / scale:,.3g}"
            share = escape(x.reason) if x.rate is None else f"{x.rate / own:.2f}" if own else "–"
            table.add_row(name, f"{x.on_paper:.2f}", rate, share)
        console.print(table)


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Everything, in types that JSON has; numbers that are not finite are null."""
    machine, shape = outcome.machine, outcome.shape
    return {
        "passed": outcome.passed,
        "seconds": outcome.seconds,
        "device": {"type": machine.device.type, "name": machine.device_name},
        "versions": machine.versions,
        "backends": list(machine.backends),
        "interpreted": machine.interpreted,
        "dtypes": [dtype_name(dtype) for dtype in machine.dtypes],
        "absent": machine.absent,
        "products": machine.products,
        "checks": [
            {name: _finite(x) for name, x in asdict(check).items()}
            | {"ratio": _finite(check.ratio), "passed": check.passed}
            for check in outcome.checks
        ],
        "timing": {
            "skipped": outcome.no_timing,
            "shape": None if shape is None else shape._asdict() | {"dtype": dtype_name(shape.dtype)},
            "rows": [asdict(x) for x in outcome.timings],
        },
        "failures": outcome.failures,
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _failure(check: Check) -> str:
    place = f"{check.op}, {check.group}: {check.case}, {check.backend}, {check.dtype}"
    if check.message is not None:
        return f"{place}: {check.message}"
    if check.kind == "determinism":
        return f"{place}: {check.tensor} differs by {check.error:.3g} between runs"
    return f"{place}: {check.tensor} is off by {check.error:.3g}, allowed {check.allowed:.3g}"


def _parity_table(backend: str, checks: Sequence[Check], fp32: str) -> Table:
    """``fp32`` is what the column of that dtype is called."""
    dtypes = list(dict.fromkeys(check.dtype for check in checks))
    table = Table(title=f"parity, backend {backend}", caption=_RULE, box=box.SIMPLE, caption_justify="left")
    table.add_column("function")
    table.add_column("options")
    table.add_column("cases", justify="right")
    for dtype in dtypes:
        table.add_column(fp32 if dtype == "fp32" else dtype, justify="right")
    groups: dict[tuple[str, str], list[Check]] = {}
    # The functions come in the order in which they were checked first.
    ops = list(dict.fromkeys(check.op for check in checks))
    for check in sorted(checks, key=lambda check: ops.index(check.op)):
        groups.setdefault((check.op, check.group), []).append(check)
    for (op, group), members in groups.items():
        cells = [_parity_cell([check for check in members if check.dtype == dtype]) for dtype in dtypes]
        table.add_row(op, group, str(len({check.case for check in members})), *cells)
    return table


def _parity_cell(checks: Sequence[Check]) -> str:
    """The worst of some checks."""
    if not checks:
        return "–"
    raised = [check for check in checks if check.message is not None]
    if raised:
        return f"[red]{len(raised)} raised"
    worst = max(checks, key=lambda check: math.inf if math.isnan(check.ratio) else check.ratio)
    return f"{worst.ratio:.2f}" if worst.passed else f"[red]{worst.tensor} {worst.ratio:.3g}"


def _determinism_lines(checks: Sequence[Check]) -> Iterator[str]:
    for (op, case), group in groupby(checks, key=lambda check: (check.op, check.case)):
        members = list(group)
        held = [check.dtype for check in members if check.passed]
        place = f"repeated runs, {members[0].backend}: {op}, {case}"
        if held:
            yield f"{place}: bit-identical in {', '.join(held)}"
        broken = [check for check in members if not check.passed]
        if broken:
            yield f"[red]{place}: not bit-identical in {', '.join(check.dtype for check in broken)}"


def _timing_table(shape: Shape, timings: Sequence[Timing]) -> Table:
    names = list(dict.fromkeys(x.implementation for x in timings))
    table = Table(
        title=f"forward and backward, {shape.rows} rows, head {shape.hidden_size} × {shape.vocab_size}, "
        f"{dtype_name(shape.dtype)}",
        caption="Median time, speed relative to plain torch (its logits in the model's dtype), extra peak memory.",
        caption_justify="left",
        box=box.SIMPLE,
    )
    table.add_column("batch")
    for name in names:
        table.add_column(name if name == PLAIN else f"srpo_loss, {name}", justify="right")
    for workload in WORKLOADS:
        found = {x.implementation: x for x in timings if x.workload == workload}
        table.add_row(workload, *(_timing_cell(found[name], found[PLAIN]) if name in found else "–" for name in names))
    return table


def _timing_cell(timing: Timing, plain: Timing) -> str:
    if timing.milliseconds is None:
        return f"[{'red' if timing.failed else 'dim'}]{escape(timing.note or '')}"
    parts = [f"{timing.milliseconds:.3g} ms"]
    if plain.milliseconds is not None and timing is not plain:
        parts.append(f"{plain.milliseconds / timing.milliseconds:.2f}×")
    parts.append(f"{timing.peak_mib:,.0f} MiB" if timing.peak_mib is not None else timing.note or "")
    return escape(", ".join(parts))


def _verdict(outcome: Outcome) -> str:
    machine, failures = outcome.machine, outcome.failures
    place, count = f"{machine.device} ({escape(machine.device_name)})", f"{len(outcome.checks):,} checks"
    if not outcome.checks:
        return f"[bold red]FAIL[/]: nothing was checked on {place}: no check was selected, or nothing runs there"
    if failures:
        first = escape(failures[0])
        return f"[bold red]FAIL[/]: {len(failures)} failures in {count} on {place}; the first: {first}"
    backends = " and ".join(machine.backends)
    return f"[bold green]PASS[/]: {count} held on {place}, backend {backends}, in {outcome.seconds:.0f} s"
