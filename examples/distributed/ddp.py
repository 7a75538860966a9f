"""DDP with gradient accumulation: ``torchrun --standalone --nproc-per-node 2 -m examples.distributed.ddp``."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import srpo_kernels as sk
from examples.distributed import join_processes
from examples.distributed.rollouts import (
    Rollouts,
    global_normalizers,
    make_policy,
    make_rollouts,
    make_teacher,
    micro_batch_loss,
)


def accumulate_gradients(
    ddp: DistributedDataParallel, teacher: nn.Module, micro_batches: Sequence[Rollouts], config: sk.SRPOConfig
) -> torch.Tensor:
    """Gradients in ``ddp``'s parameters, and this rank's part of the loss."""
    normalizers = global_normalizers(teacher, micro_batches, config)
    total = torch.zeros(())
    for i, batch in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        with contextlib.nullcontext() if last else ddp.no_sync():
            out = sk.call_as_forward(ddp, micro_batch_loss, ddp.module, batch, teacher, normalizers, config)
            # DDP divides the sum over ranks by their number.
            sk.scale_for_gradient_mean(out.loss).backward()
        total = total + out.loss.detach()
    return total


def train() -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    policy, config = make_policy(), sk.SRPOConfig()
    teacher, ddp = make_teacher(policy), DistributedDataParallel(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    for step in range(3):
        rollouts = make_rollouts(8 * world_size, seed=step)
        micro_batches = [rollouts.select(slice(i, None, 2 * world_size)) for i in (rank, rank + world_size)]
        optimizer.zero_grad()
        loss = accumulate_gradients(ddp, teacher, micro_batches, config)
        optimizer.step()
        dist.all_reduce(loss)
        if rank == 0:
            print(f"step {step}: loss {loss:.6f}")


def main() -> None:
    join_processes("examples.distributed.ddp")
    # DDP is gone before its group: as the last owner of one it can wait for gloo's threads, and they for Python.
    train()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
