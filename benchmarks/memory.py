"""Extra peak memory of one forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from rich.console import Console

from benchmarks import tables
from benchmarks.options import Memory
from benchmarks.processes import extra_resident_bytes, fresh_peak
from benchmarks.results import Measurement, ResultsFile, resolve_device, resolve_threads, single
from srpo_kernels.verify.batches import Case, make_batch
from srpo_kernels.verify.kinds import ProviderName
from srpo_kernels.verify.providers import Step, prepare
from srpo_kernels.verify.providers.fused import peak_limit
from tools.documents import print_table


def memory(options: Memory) -> None:
    """What ``Memory`` describes."""
    threads = resolve_threads(options.threads)
    where = resolve_device(options.device)
    console = Console()
    file = ResultsFile(options.out, where, threads, resume=options.resume)
    cases = [Case(options.head, workload, options.rows, options.dtype) for workload in options.workloads]
    for case in file.missing(cases):
        cells: list[Measurement[Case]] = []
        with console.status(case.name) as status:
            for provider in options.providers:
                status.update(f"{case.name}: {provider}")
                cells += peaks(case, provider, where, threads)
        file.add(cells)
        print_table(console, tables.case_table(case, cells))


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
