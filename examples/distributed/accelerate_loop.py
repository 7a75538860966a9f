"""accelerate: ``accelerate launch --cpu --num_processes 2 -m examples.distributed.accelerate_loop``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import nn

import srpo_kernels as sk
from examples.distributed.rollouts import (
    Rollouts,
    global_normalizers,
    make_policy,
    make_rollouts,
    make_teacher,
    micro_batch_loss,
)


def accumulate_gradients(
    accelerator: Accelerator,
    model: nn.Module,
    teacher: nn.Module,
    micro_batches: Sequence[Rollouts],
    config: sk.SRPOConfig,
) -> torch.Tensor:
    """Gradients in the parameters of a prepared model, and this process's part of the loss."""
    normalizers = global_normalizers(teacher, micro_batches, config)
    policy, total = accelerator.unwrap_model(model), torch.zeros(())
    for batch in micro_batches:
        with accelerator.accumulate(model):
            out = sk.call_as_forward(model, micro_batch_loss, policy, batch, teacher, normalizers, config)
            # `accelerator.backward` divides by this number, whatever the number of micro-batches is.
            steps = accelerator.gradient_accumulation_steps
            accelerator.backward(sk.scale_for_gradient_mean(out.loss, accumulation_steps=steps))
        total = total + out.loss.detach()
    return total


def train(accelerator: Accelerator) -> None:
    rank, world_size = accelerator.process_index, accelerator.num_processes
    policy, config = make_policy(), sk.SRPOConfig()
    teacher = make_teacher(policy)
    model, optimizer = accelerator.prepare(policy, torch.optim.AdamW(policy.parameters(), lr=1e-3))
    for step in range(3):
        rollouts = make_rollouts(8 * world_size, seed=step)
        micro_batches = [rollouts.select(slice(i, None, 2 * world_size)) for i in (rank, rank + world_size)]
        optimizer.zero_grad()
        loss = accumulate_gradients(accelerator, model, teacher, micro_batches, config)
        optimizer.step()
        accelerator.print(f"step {step}: loss {accelerator.reduce(loss):.6f}")


def main() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    train(accelerator)
    # DDP is gone before its group: as the last owner of one it can wait for gloo's threads, and they for Python.
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main()
