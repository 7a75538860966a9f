"""Peak memory of one step, each measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import psutil
import torch

from benchmarks.cases import Case, make_batch

_STATUS = Path("/proc/self/status")
# glibc otherwise keeps what the batch's preparation has freed, and the step would find it there.
_RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}


def peak(case: Case, provider: str, device: str, threads: int) -> None:
    """Print the extra peak memory of one step in bytes; the other commands call this in a fresh process per cell.

    On a CPU it is the highest resident set of the process during the step less the resident set before it, when
    inputs, imports and thread pools are there already. What remains is buffers, activations, gradients, and
    what the matrix library packs. On a GPU it is what the allocator handed out.

    Args:
        case: what is measured.
        provider: what computes the loss.
        device: cpu or cuda.
        threads: threads of torch.
    """
    # Providers ask this module for free memory.
    from benchmarks.providers import prepare

    torch.set_num_threads(threads)
    where = torch.device(device)
    warm_up = make_batch(Case("tiny", case.workload, 128, case.dtype, case.softcap, case.active), where)
    prepare(provider, warm_up)()  # type: ignore[arg-type]
    step = prepare(provider, make_batch(case, where))  # type: ignore[arg-type]
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        print(torch.cuda.max_memory_allocated() - before)
    else:
        before = _resident_bytes("VmRSS")
        step()
        print(_resident_bytes("VmHWM") - before)


def measure_peak(case: Case, provider: str, device: torch.device, threads: int) -> int | None:
    """Extra peak bytes of one provider on one case; None where the operating system does not tell."""
    if device.type == "cpu" and not _STATUS.exists():
        return None
    command = [sys.executable, "-m", "benchmarks", "peak"]
    command += [f"--{name}={value}" for name, value in _flags(case).items()]
    command += [f"--provider={provider}", f"--device={device.type}", f"--threads={threads}"]
    environment = os.environ | _RETURN_FREED_MEMORY
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, env=environment)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {provider} on {case.name} failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def available_bytes(device: torch.device) -> int:
    """Free memory of the device."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else int(psutil.virtual_memory().available)


def _flags(case: Case) -> dict[str, object]:
    return {f"case.{name.replace('_', '-')}": value for name, value in asdict(case).items()}


def _resident_bytes(field: str) -> int:
    """A field of this process's status; the kernel gives KiB."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024
