"""GSPO with each sequence spread over ranks.

``torchrun --standalone --nproc-per-node 2 -m examples.distributed.sequence_parallel``

A sequence's ratio is the mean of log-ratios on several ranks, which one call of ``srpo_loss`` cannot know without
``sequence_parallel_group``.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

import srpo_kernels as sk
from examples.distributed import join_processes


def gspo_loss(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    mask: Tensor,
    advantages: Tensor,
    old_log_probs: Tensor,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """This rank's part of the loss, for its positions ``[B, T_rank]`` of every sequence; advantages are ``[B]``."""
    group = dist.group.WORLD if group is None else group
    config = sk.SRPOConfig(loss_type="gspo")
    norms = sk.Normalizers.from_batch(mask, None, None, config=config).all_reduce(group)
    # Each rank has counted every sequence that it has a token of.
    lengths = mask.sum(1)
    dist.all_reduce(lengths, group=group)
    norms = norms._replace(sequence_count=(lengths > 0).sum())
    out = sk.srpo_loss(
        hidden,
        weight,
        target_ids,
        advantages=advantages,
        mask=mask,
        old_log_probs=old_log_probs,
        normalizers=norms,
        sequence_parallel_group=group,
        config=config,
    )
    return out.loss


def main() -> None:
    join_processes("examples.distributed.sequence_parallel")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 6 * world_size, 8), torch.randn(33, 8, requires_grad=True)
    target_ids, mask = torch.randint(0, 33, hidden.shape[:2]), torch.rand(hidden.shape[:2]) < 0.8
    advantages, old_log_probs = torch.randn(4), -3.5 + torch.randn(hidden.shape[:2])
    hidden, target_ids, mask, old_log_probs = (
        x.chunk(world_size, 1)[rank] for x in (hidden, target_ids, mask, old_log_probs)
    )
    loss = gspo_loss(hidden, weight, target_ids, mask, advantages, old_log_probs)
    loss.backward()
    total = loss.detach()
    dist.all_reduce(total)
    if rank == 0:
        print(f"loss {total:.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
