"""Forward and backward: time, ratio to bare products, agreement and extra peak memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from benchmarks import tables
from benchmarks.measure import default_rows
from benchmarks.measure import measure as measure_ways
from benchmarks.memory import peaks
from benchmarks.results import RESULTS, Measurement, ResultsFile, resolve_device
from srpo_kernels.verify.agreement import compare
from srpo_kernels.verify.batches import DEFAULT_ACTIVE, Case, DtypeName, HeadName, Workload
from srpo_kernels.verify.providers import PROVIDERS, ProviderName, prepare
from srpo_kernels.verify.rounds import Rounds

_MAIN: tuple[Workload, ...] = ("policy", "jsd", "routed")
# Gemma 2's; no released Gemma 3 has one.
_SOFTCAP = 30.0


def published(device: torch.device) -> list[Case]:
    """The cases of the committed results."""

    def case(head: HeadName, workload: Workload, dtype: DtypeName = "float32") -> Case:
        return Case(head, workload, default_rows(head, device), dtype)

    cases = [case(head, workload) for head in ("smollm2-135m", "qwen3-0.6b") for workload in _MAIN]
    cases += [case("smollm2-135m", workload, "bfloat16") for workload in _MAIN]
    cases += [replace(case("smollm2-135m", "routed"), active=share) for share in (0.25, 0.8)]
    cases += [case("llama-3-8b", "policy"), case("qwen3-8b", "routed")]
    cases += [case("gemma-3-1b", "jsd"), replace(case("gemma-3-1b", "jsd"), softcap=_SOFTCAP)]
    cases += [case("smollm2-135m", workload) for workload in ("forward_kl", "reverse_kl")]
    cases += [case("qwen3-0.6b", "jsd", "bfloat16")]
    return cases


def speed(
    heads: tuple[HeadName, ...] = (),
    workloads: tuple[Workload, ...] = _MAIN,
    dtypes: tuple[DtypeName, ...] = ("float32",),
    rows: int | None = None,
    softcap: float | None = None,
    active: float = DEFAULT_ACTIVE,
    providers: tuple[ProviderName, ...] = PROVIDERS,
    rounds: int = 5,
    budget: float = 45.0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int = torch.get_num_threads(),
    memory: bool = True,
    resume: bool = False,
    out: Path = RESULTS / "speed.csv",
) -> None:
    """Time and extra peak memory of forward + backward to dX and dW, every provider beside the others.

    Providers take turns in one process, in an order that rotates, and must agree on loss and gradients before
    they are timed. Times are medians over rounds with their 20th and 80th percentiles; ratios to `bare`, the
    unavoidable matrix products on the same active rows, are taken within each round. Peak memory comes from a
    fresh process per provider and case.

    Args:
        heads: LM heads by the model they are of; `tiny` is for trying out. None given: the published list of cases,
            and `workloads`, `dtypes`, `rows`, `softcap` and `active` are not used.
        workloads: all rows policy, all rows distilled with one divergence, or a routed batch: 40 % of the sequences
            distilled, 30 % of the others with advantage 0, and padding.
        dtypes: of hidden states and head.
        rows: positions of a batch, padding included, a multiple of 32; each head's own number if not given.
        softcap: bound of the logits.
        active: share of a routed batch's rows that can move a weight, at most 0.82; padding makes up the rest.
        providers: what to compare.
        rounds: times that every provider runs, at most.
        budget: seconds of a case after which no round begins, but for the first three.
        device: auto is a GPU where there is one.
        threads: threads of torch.
        memory: measure peak memory too.
        resume: keep the cases that are in `out` already and measure the others.
        out: CSV file to write; without `resume` one that is there is replaced.
    """
    if rounds < 1:
        raise SystemExit(f"rounds must be >= 1, got {rounds}")
    torch.set_num_threads(threads)
    where = resolve_device(device)
    cases = published(where)
    if heads:
        cases = [
            Case(head, workload, default_rows(head, where) if rows is None else rows, dtype, softcap, active)
            for head in heads
            for workload in workloads
            for dtype in dtypes
        ]
    console = tables.console()
    file = ResultsFile(out, where, threads, resume=resume)
    measurements: list[Measurement[Case]] = []
    for case in file.missing(cases):
        cells = list(measure(case, providers, Rounds(rounds, budget), where, threads, memory, console))
        measurements += cells
        file.add(cells)
        console.print(tables.case_table(case, cells))
    console.print(tables.ratio_table(measurements))


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
