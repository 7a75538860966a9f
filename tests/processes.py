"""Real processes that talk to each other, for the tests of what crosses ranks."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this build of torch has no gloo backend"
)
# Ranks that run kernels do so on the CPU. A mark, not a condition: ranks import this before they ask for a device.
interpreted = pytest.mark.needs_interpreter

# What takes seconds to import, and starts no thread.
_PRELOADED = [
    "torch", "torch.distributed", "hypothesis", "reference", "srpo_kernels._names", "tests.comparison", "pandas",
    "transformers.models.qwen3.modeling_qwen3",
]  # fmt: skip


class RankError(RuntimeError):
    """Some ranks failed; ``tracebacks`` has the text of each one that could still say why, by rank."""

    def __init__(self, tracebacks: dict[int, str]) -> None:
        self.tracebacks = tracebacks
        super().__init__("\n".join(f"rank {rank}:\n{text}" for rank, text in sorted(tracebacks.items())))


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 120) -> list[Any]:
    """``function(rank, *args)`` in ``world_size`` new processes of one gloo group; returns what each rank returned.

    ``function`` is a module's own, so that it can be sent to a process; ``args`` and results are what torch can save.
    Raises RankError with the traceback of every rank that failed, and TimeoutError, naming the ranks, when some are
    not done after ``timeout_seconds``. A collective that waits for a lost rank fails after half of that time.

    Processes are forks of `fork_server`'s.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In a file: torch would send each tensor to each process through a file descriptor of its own.
        torch.save(args, folder / "arguments.pt")
        fork_server()
        processes = mp.start_processes(
            _work,
            (function, world_size, folder, timeout_seconds / 2),
            world_size,
            join=False,
            start_method="forkserver",
        ).processes
        deadline = time.monotonic() + timeout_seconds
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        tracebacks = {rank: path.read_text() for rank in range(world_size) if (path := _failure(folder, rank)).exists()}
        lost = [rank for rank in range(world_size) if rank not in late and not _result(folder, rank).exists()]
        tracebacks |= {
            rank: f"the process ended with exit code {processes[rank].exitcode}"
            for rank in lost
            if rank not in tracebacks
        }
        if tracebacks:
            raise RankError(tracebacks)
        if late:
            raise TimeoutError(f"ranks {late} were not done after {timeout_seconds} seconds")
        return [torch.load(_result(folder, rank), weights_only=False) for rank in range(world_size)]


def fork_server() -> BaseContext:
    """Makes processes as forks of one that has imported what tests need, and has done nothing else."""
    multiprocessing.set_forkserver_preload(_PRELOADED)
    return multiprocessing.get_context("forkserver")


def _work(rank: int, function: Callable[..., Any], world_size: int, folder: Path, timeout_seconds: float) -> None:
    torch.set_num_threads(1)
    # Ranks are a CPU's beside an accelerator too.
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
        result = function(rank, *torch.load(folder / "arguments.pt", weights_only=False))
        # None leaves before all are done: a rank that is gone early would fail the others' last collective.
        dist.barrier()
        dist.destroy_process_group()
        torch.save(result, _result(folder, rank))
    except BaseException:
        _failure(folder, rank).write_text(traceback.format_exc())
        # At once: the destructors of a broken group may wait for the others.
        os._exit(1)


def _result(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.pt"


def _failure(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.txt"
