"""Programs for several processes on a CPU, and how they start."""

from __future__ import annotations

import os

import torch.distributed as dist


def join_processes(program: str) -> None:
    """Join the processes that torchrun has started; without it, exit with the command to run."""
    if "RANK" not in os.environ:
        raise SystemExit(f"start several processes: torchrun --standalone --nproc-per-node 2 -m {program}")
    dist.init_process_group("gloo")
