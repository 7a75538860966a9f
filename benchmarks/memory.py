"""Extra peak memory of one forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch

from benchmarks import tables
from benchmarks.processes import extra_resident_bytes, fresh_peak
from benchmarks.results import RESULTS, Measurement, ResultsFile, resolve_device, single
from srpo_kernels.verify.batches import Case, DtypeName, HeadName, Workload, make_batch
from srpo_kernels.verify.providers import COMPARED, ProviderName, Step, prepare
from srpo_kernels.verify.providers.fused import peak_limit


def memory(
    head: HeadName = "qwen3-0.6b",
    workloads: tuple[Workload, ...] = ("policy", "jsd", "routed"),
    rows: int = 4_096,
    dtype: DtypeName = "float32",
    providers: tuple[ProviderName, ...] = COMPARED,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int = torch.get_num_threads(),
    resume: bool = False,
    out: Path = RESULTS / "memory.csv",
) -> None:
    """Extra peak memory alone, for more rows than there is time to compare in `speed`.

    Every provider takes one step on every kind of batch, in a fresh process. One that refuses, or that is killed for
    want of memory, has that as its reason.

    Args:
        head: LM head by the model it is of.
        workloads: kinds of batches.
        rows: positions of a batch, padding included, a multiple of 32.
        dtype: of hidden states and head.
        providers: what to compare.
        device: auto is a GPU where there is one.
        threads: threads of torch.
        resume: keep the cases that are in `out` already and measure the others.
        out: CSV file to write; without `resume` one that is there is replaced.
    """
    where = resolve_device(device)
    console = tables.console()
    file = ResultsFile(out, where, threads, resume=resume)
    for case in file.missing([Case(head, workload, rows, dtype) for workload in workloads]):
        cells: list[Measurement[Case]] = []
        with console.status(case.name) as status:
            for provider in providers:
                status.update(f"{case.name}: {provider}")
                cells += peaks(case, provider, where, threads)
        file.add(cells)
        console.print(tables.case_table(case, cells))


def peaks(case: Case, provider: ProviderName, device: torch.device, threads: int) -> Iterator[Measurement[Case]]:
    """What a provider takes on a case, and for this library on a CPU what it promises to stay below."""
    yield from fresh_peak(case, provider, measure_peak, case, provider, device, threads)
    if provider == "srpo_kernels" and device.type == "cpu":
        yield Measurement(case, provider, "peak_limit_bytes", single(peak_limit(case)))


def measure_peak(
    case: Case, provider: str, device: torch.device, threads: int, prepare: Callable[..., Step] = prepare
) -> int | None:
    """Extra peak bytes of one step in this process, which must be a fresh one; None where the system does not tell.

    On a CPU it is the highest resident set of the process during the step less the resident set before it, when
    inputs, imports and thread pools are there already. What remains is buffers, activations, gradients, and
    what the matrix library packs. On a GPU it is what the allocator handed out.
    """
    torch.set_num_threads(threads)
    warm_up = make_batch(Case("tiny", case.workload, 128, case.dtype, case.softcap, case.active), device)
    prepare(provider, warm_up)()
    step = prepare(provider, make_batch(case, device))
    if device.type == "cpu":
        return extra_resident_bytes(step)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before
