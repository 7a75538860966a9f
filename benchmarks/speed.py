"""Forward and backward: time, ratio to bare products, agreement and extra peak memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from benchmarks import tables
from benchmarks.memory import peaks
from benchmarks.results import RESULTS, Measurement, ResultsFile, resolve_device, single
from srpo_kernels.verify.agreement import TOLERANCES, compare
from srpo_kernels.verify.batches import DEFAULT_ACTIVE, HEADS, Case, DtypeName, HeadName, Workload, make_batch
from srpo_kernels.verify.providers import PROVIDERS, ProviderName, Step, Unsupported, prepare
from srpo_kernels.verify.rounds import Rounds, interleave, quantiles

_MAIN: tuple[Workload, ...] = ("policy", "jsd", "routed")
# Gemma 2's; no released Gemma 3 has one.
_SOFTCAP = 30.0


def published(device: torch.device) -> list[Case]:
    """The cases of the committed results."""

    def case(head: HeadName, workload: Workload, dtype: DtypeName = "float32") -> Case:
        return Case(head, workload, _rows(head, device), dtype)

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
            Case(head, workload, _rows(head, where) if rows is None else rows, dtype, softcap, active)
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


def _rows(head: HeadName, device: torch.device) -> int:
    return HEADS[head].gpu_rows if device.type == "cuda" else HEADS[head].cpu_rows


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
    with console.status(case.name) as status:

        def progress(what: str) -> None:
            status.update(f"{case.name}: {what}")

        progress("making the batch")
        batch = make_batch(case, device)
        steps: dict[ProviderName, Step] = {}
        for name in providers:
            try:
                steps[name] = prepare(name, batch)
            except Unsupported as reason:
                yield Measurement(case, name, "seconds", None, str(reason))
        progress("comparing losses and gradients")
        errors = compare(steps, batch, TOLERANCES[case.dtype])
        seconds = interleave(steps, rounds, device, progress)
        ran = tuple(steps)
        # The processes that measure memory need the room.
        del batch, steps
        for name in ran:
            yield Measurement(case, name, "seconds", quantiles(seconds[name]))
            if "bare" in seconds:
                ratios = [a / b for a, b in zip(seconds[name], seconds["bare"], strict=True)]
                yield Measurement(case, name, "ratio_to_bare", quantiles(ratios))
            for quantity, error in errors[name]._asdict().items() if name in errors else ():
                yield Measurement(case, name, f"{quantity}_difference", single(error))
            if memory and name != "bare":
                progress(f"memory, {name}")
                yield from peaks(case, name, device, threads)
