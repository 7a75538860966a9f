"""Peak memory of one step, each measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.cases import HEADS, Case, HeadName, Workload, make_batch
from benchmarks.providers import ProviderName, prepare

_STATUS = Path("/proc/self/status")


def peak(head: HeadName, workload: Workload, provider: ProviderName, rows: int, threads: int) -> None:
    """Print the extra peak memory of one step in bytes; `speed` calls this in a fresh process for every cell.

    It is the highest resident set of the process during the step less the resident set before it, when
    inputs, imports and thread pools are there already. What remains is buffers, activations, gradients, and
    what the matrix library packs.

    Args:
        head: LM head.
        workload: kind of batch.
        provider: what computes the loss.
        rows: positions, padding included.
        threads: threads of torch.
    """
    torch.set_num_threads(threads)
    prepare(provider, make_batch(Case("tiny", workload, HEADS["tiny"].rows)))()
    batch = make_batch(Case(head, workload, rows))
    before = _resident_bytes("VmRSS")
    prepare(provider, batch)()
    print(_resident_bytes("VmHWM") - before)


def measure_peak(case: Case, provider: ProviderName, threads: int) -> int | None:
    """Extra peak bytes of one provider on one case; None where the operating system does not tell."""
    if not _STATUS.exists():
        return None
    options = {
        "head": case.head,
        "workload": case.workload,
        "provider": provider,
        "rows": case.rows,
        "threads": threads,
    }
    command = [sys.executable, "-m", "benchmarks", "peak"]
    command += [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {provider} on {case.name} failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def _resident_bytes(field: str) -> int:
    """A field of this process's status; the kernel gives KiB."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024
