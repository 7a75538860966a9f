"""FSDP2 with gradient accumulation: ``torchrun --standalone --nproc-per-node 2 -m examples.distributed.fsdp2``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

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


def shard(model: nn.Module) -> None:
    """Each layer is a unit of its own; embedding and head, tied or not, are the root's."""
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)


def accumulate_gradients(
    model: nn.Module, teacher: nn.Module, micro_batches: Sequence[Rollouts], config: sk.SRPOConfig
) -> torch.Tensor:
    """Gradients in the shards of ``model``'s parameters, and this rank's part of the loss."""
    normalizers = global_normalizers(teacher, micro_batches, config)
    total = torch.zeros(())
    for batch in micro_batches:
        # Within the root's forward its parameters are whole. A function without arguments leaves FSDP none to cast.
        def loss(batch: Rollouts = batch) -> sk.SRPOOutput:
            return micro_batch_loss(model, batch, teacher, normalizers, config)

        out = sk.call_as_forward(model, loss)
        # FSDP divides the sum over ranks by their number, in every backward.
        sk.scale_for_gradient_mean(out.loss).backward()
        total = total + out.loss.detach()
    return total


def main() -> None:
    join_processes("examples.distributed.fsdp2")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    policy, config = make_policy(tied=True), sk.SRPOConfig()
    teacher = make_teacher(policy)
    shard(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    for step in range(3):
        rollouts = make_rollouts(8 * world_size, seed=step)
        micro_batches = [rollouts.select(slice(i, None, 2 * world_size)) for i in (rank, rank + world_size)]
        optimizer.zero_grad()
        loss = accumulate_gradients(policy, teacher, micro_batches, config)
        optimizer.step()
        dist.all_reduce(loss)
        if rank == 0:
            print(f"step {step}: loss {loss:.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
