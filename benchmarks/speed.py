"""Forward and backward: time, ratio to bare products, agreement and extra peak memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from rich.console import Console

from benchmarks import tables
from benchmarks.measure import measure as measure_ways
from benchmarks.measure import rows_of
from benchmarks.memory import peaks
from benchmarks.options import Speed
from benchmarks.results import Measurement, ResultsFile, resolve_device, resolve_threads
from srpo_kernels.verify.agreement import compare
from srpo_kernels.verify.batches import Case
from srpo_kernels.verify.kinds import DtypeName, HeadName, ProviderName, Workload
from srpo_kernels.verify.providers import prepare
from srpo_kernels.verify.rounds import Rounds
from tools.documents import print_table

# Gemma 2's; no released Gemma 3 has one.
_SOFTCAP = 30.0


def published(device: torch.device) -> list[Case]:
    """The cases of the committed results."""

    def case(head: HeadName, workload: Workload, dtype: DtypeName = "float32") -> Case:
        return Case(head, workload, rows_of(head, device), dtype)

    cases = [case(head, workload) for head in ("smollm2-135m", "qwen3-0.6b") for workload in Speed.workloads]
    cases += [case("smollm2-135m", workload, "bfloat16") for workload in Speed.workloads]
    cases += [replace(case("smollm2-135m", "routed"), active=share) for share in (0.25, 0.8)]
    cases += [case("llama-3-8b", "policy"), case("qwen3-8b", "routed")]
    cases += [case("gemma-3-1b", "jsd"), replace(case("gemma-3-1b", "jsd"), softcap=_SOFTCAP)]
    cases += [case("smollm2-135m", workload) for workload in ("forward_kl", "reverse_kl")]
    cases += [case("qwen3-0.6b", "jsd", "bfloat16")]
    return cases


def speed(options: Speed) -> None:
    """What ``Speed`` describes."""
    if options.rounds < 1:
        raise SystemExit(f"rounds must be >= 1, got {options.rounds}")
    threads = resolve_threads(options.threads)
    where = resolve_device(options.device)
    cases = published(where)
    if options.heads:
        cases = [
            Case(head, workload, rows_of(head, where, options.rows), dtype, options.softcap, options.active)
            for head in options.heads
            for workload in options.workloads
            for dtype in options.dtypes
        ]
    console = Console()
    file = ResultsFile(options.out, where, threads, resume=options.resume)
    rounds = Rounds(options.rounds, options.budget)
    measurements: list[Measurement[Case]] = []
    for case in file.missing(cases):
        cells = list(measure(case, options.providers, rounds, where, threads, options.memory, console))
        measurements += cells
        file.add(cells)
        print_table(console, tables.case_table(case, cells))
    print_table(console, tables.ratio_table(measurements))


def measure(
    case: Case,
    providers: tuple[ProviderName, ...],
    rounds: Rounds,
    device: torch.device,
    threads: int,
    memory: bool,
    console: Console,
) -> Iterator[Measurement[Case]]:
    """Every provider on one case; one that cannot do it gives its reason."""
    found = partial(peaks, case, device=device, threads=threads) if memory else None
    return measure_ways(case, providers, rounds, device, console, prepare=prepare, compare=compare, peaks=found)
