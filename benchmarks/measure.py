"""Ways to compute one case, in turns: time, ratio to the bare products, agreement and peak memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from rich.console import Console

from benchmarks.results import Measurement, single
from srpo_kernels.verify.agreement import TOLERANCES, Errors
from srpo_kernels.verify.batches import Batch, Case, make_batch
from srpo_kernels.verify.kinds import HEADS, HeadName
from srpo_kernels.verify.providers import Step, Unsupported
from srpo_kernels.verify.rounds import Rounds, interleave, quantiles

Way = TypeVar("Way", bound=str)


def measure(
    case: Case,
    ways: Sequence[Way],
    rounds: Rounds,
    device: torch.device,
    console: Console,
    *,
    prepare: Callable[[Way, Batch], Step],
    compare: Callable[[dict[Way, Step], Batch, float], dict[Way, Errors]],
    peaks: Callable[[Way], Iterator[Measurement[Case]]] | None,
) -> Iterator[Measurement[Case]]:
    """Every way on one case; one that cannot do it gives its reason. ``peaks`` None: memory is not measured."""
    with console.status(case.name) as status:

        def progress(what: str) -> None:
            status.update(f"{case.name}: {what}")

        progress("making the batch")
        batch = make_batch(case, device)
        steps: dict[Way, Step] = {}
        for way in ways:
            try:
                steps[way] = prepare(way, batch)
            except Unsupported as reason:
                yield Measurement(case, way, "seconds", None, str(reason))
        progress("comparing losses and gradients")
        errors = compare(steps, batch, TOLERANCES[case.dtype])
        seconds = interleave(steps, rounds, device, progress)
        # The processes that measure memory need the room.
        del batch, steps
        bare = next((times for way, times in seconds.items() if way == "bare"), None)
        for way, times in seconds.items():
            yield Measurement(case, way, "seconds", quantiles(times))
            if bare is not None:
                ratios = [a / b for a, b in zip(times, bare, strict=True)]
                yield Measurement(case, way, "ratio_to_bare", quantiles(ratios))
            for quantity, error in errors[way]._asdict().items() if way in errors else ():
                yield Measurement(case, way, f"{quantity}_difference", single(error))
            if peaks is not None and way != "bare":
                progress(f"memory, {way}")
                yield from peaks(way)


def rows_of(head: HeadName, device: torch.device, asked: int | None = None) -> int:
    """Positions of a batch: those that are asked for, or the head's own."""
    if asked is not None:
        return asked
    return HEADS[head].gpu_rows if device.type == "cuda" else HEADS[head].cpu_rows
