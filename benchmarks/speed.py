"""Forward and backward: time, ratio to bare products, agreement and extra peak memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import tables
from benchmarks.cases import HEADS, Case, HeadName, Workload, make_batch
from benchmarks.memory import measure_peak
from benchmarks.providers import PROVIDERS, ProviderName, Step, prepare
from benchmarks.providers.fused import peak_limit
from benchmarks.results import Errors, Measurement, write_csv
from benchmarks.timing import interleave, quantiles

# Providers that differ more than rounding explains do not compute the same thing.
_AGREEMENT = 1e-3
# Columns of output that goes to a file.
_FILE_WIDTH = 120


def speed(
    heads: tuple[HeadName, ...] = ("qwen3-0.6b", "smollm2-135m"),
    workloads: tuple[Workload, ...] = ("policy", "distillation", "routed"),
    providers: tuple[ProviderName, ...] = PROVIDERS,
    rows: int | None = None,
    rounds: int = 7,
    threads: int = torch.get_num_threads(),
    memory: bool = True,
    out: Path = Path("benchmarks/results/speed.csv"),
) -> None:
    """Time and extra peak memory of forward + backward to dX and dW, in fp32.

    Providers take turns in one process, in an order that rotates, and must agree on loss and gradients before
    they are timed. Times are medians over rounds with their 20th and 80th percentiles; ratios to `bare`, the
    unavoidable matrix products on the same active rows, are taken within each round. Peak memory comes from a
    fresh process per provider and case.

    Args:
        heads: LM heads by the model they are of; `tiny` is for trying out.
        workloads: all rows policy, all rows distillation (JSD), or a routed batch: 35 % padding, 40 % of the
            sequences distilled, 30 % of the others with advantage 0.
        providers: what to compare.
        rows: positions of a batch, padding included, a multiple of 32; each head's own number if not given.
        rounds: times that every provider runs.
        threads: threads of torch.
        memory: measure peak memory too.
        out: CSV file to write; one that is there is replaced.
    """
    if rounds < 1:
        raise SystemExit(f"rounds must be >= 1, got {rounds}")
    torch.set_num_threads(threads)
    console = Console()
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    measurements: list[Measurement] = []
    for head in heads:
        for workload in workloads:
            case = Case(head, workload, HEADS[head].rows if rows is None else rows)
            cells = _measure(case, providers, rounds, threads, memory, console)
            measurements += cells
            write_csv(out, measurements, threads)
            console.print(tables.case_table(case, cells))
    console.print(tables.ratio_table(measurements))


def _measure(
    case: Case,
    providers: tuple[ProviderName, ...],
    rounds: int,
    threads: int,
    memory: bool,
    console: Console,
) -> list[Measurement]:
    with console.status(case.name) as status:

        def progress(what: str) -> None:
            status.update(f"{case.name}: {what}")

        progress("making the batch")
        batch = make_batch(case)
        limit = peak_limit(batch)
        steps = {name: prepare(name, batch) for name in providers}
        progress("comparing losses and gradients")
        errors = compare(steps)
        seconds = interleave(steps, rounds, progress)
        # The processes that measure memory need the room.
        del batch, steps
        peaks: dict[ProviderName, int | None] = {}
        for name in providers if memory else ():
            progress(f"memory, {name}")
            peaks[name] = measure_peak(case, name, threads)
    bare = seconds.get("bare")
    return [
        Measurement(
            case,
            name,
            quantiles(seconds[name]),
            None if bare is None else quantiles([a / b for a, b in zip(seconds[name], bare, strict=True)]),
            errors.get(name),
            peaks.get(name),
            limit if name == "srpo_kernels" else None,
        )
        for name in providers
    ]


def compare(steps: Mapping[ProviderName, Step]) -> dict[ProviderName, Errors]:
    """Run every step once, which also warms it up, and compare loss, dX and dW with the naive loss's.

    Without the naive loss among the steps, another one takes its place. RuntimeError where they differ.
    """
    expected: tuple[Tensor, ...] = ()
    errors: dict[ProviderName, Errors] = {}
    for name in sorted(steps, key=lambda name: name != "naive"):
        result = steps[name]()
        if name == "bare":
            continue
        if not expected:
            expected = result
            continue
        errors[name] = Errors(*map(_relative_error, result, expected))
        if not max(errors[name]) < _AGREEMENT:
            raise RuntimeError(f"{name} does not compute the same loss and gradients: {errors[name]}")
    return errors


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())
