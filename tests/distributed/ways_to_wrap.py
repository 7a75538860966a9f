"""One function per way to wrap: gradients of a policy's parameters from this rank's micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import srpo_kernels as sk
from examples.distributed import accelerate_loop, ddp, fsdp2
from examples.distributed.rollouts import Rollouts, global_normalizers, head_loss, micro_batch_loss

Wrapper = Callable[[nn.Module, nn.Module, Sequence[Rollouts], sk.SRPOConfig], Any]


def by_ddp(policy: nn.Module, *step: Any) -> None:
    ddp.accumulate_gradients(DistributedDataParallel(policy), *step)


def by_accelerate(policy: nn.Module, *step: Any) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=len(step[1]))
    model = accelerator.prepare(policy)
    assert isinstance(model, DistributedDataParallel)
    accelerate_loop.accumulate_gradients(accelerator, model, *step)


def by_fsdp2(policy: nn.Module, *step: Any) -> None:
    fsdp2.shard(policy)
    fsdp2.accumulate_gradients(policy, *step)


def by_fsdp2_that_adds_up(policy: nn.Module, *step: Any) -> None:
    """FSDP divides by 1, and reduces gradients in the last backward alone."""
    fsdp2.shard(policy)
    for module in (policy, *policy.model.layers):
        module.set_gradient_divide_factor(1.0)
        # Gloo has no sum of products.
        module.set_force_sum_reduction_for_comms(True)
    teacher, micro_batches, config = step
    normalizers = global_normalizers(teacher, micro_batches, config)
    for i, batch in enumerate(micro_batches):
        policy.set_requires_gradient_sync(i == len(micro_batches) - 1)
        loss = partial(micro_batch_loss, policy, batch, teacher, normalizers, config)
        sk.call_as_forward(policy, loss).loss.backward()


def by_fsdp2_with_norm_and_head(policy: nn.Module, *step: Any) -> None:
    fully_shard([policy.model.norm, policy.lm_head])
    by_fsdp2(policy, *step)


def by_fsdp2_with_embedding_and_head(policy: nn.Module, *step: Any) -> None:
    fully_shard([policy.model.embed_tokens, policy.lm_head])
    by_fsdp2(policy, *step)


def by_fsdp2_of_a_module(policy: nn.Module, *step: Any) -> None:
    """Policy and loss in one module, which is the root."""
    for layer in policy.model.layers:
        fully_shard(layer)
    module = WithLoss(policy)
    fully_shard(module)
    teacher, micro_batches, config = step
    normalizers = global_normalizers(teacher, micro_batches, config)
    for batch in micro_batches:
        sk.scale_for_gradient_mean(module(batch, teacher, normalizers, config).loss).backward()


class WithLoss(nn.Module):
    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, *arguments: Any) -> sk.SRPOOutput:
        return micro_batch_loss(self.policy, *arguments)


def by_fsdp2_of_a_head(policy: nn.Module, *step: Any, beside: bool) -> None:
    """The head is a unit of its own, within the root or beside that of the backbone."""
    for layer in policy.model.layers:
        fully_shard(layer)
    fully_shard(policy.lm_head)
    fully_shard(policy.model if beside else policy)
    teacher, micro_batches, config = step
    normalizers = global_normalizers(teacher, micro_batches, config)

    def loss(batch: Rollouts) -> sk.SRPOOutput:
        hidden = policy.model(batch.ids).last_hidden_state

        def of_hidden(hidden: Tensor) -> sk.SRPOOutput:
            return head_loss(hidden, policy.lm_head, batch, teacher, normalizers, config)

        return sk.call_as_forward(policy.lm_head, of_hidden, hidden)

    for batch in micro_batches:
        out = loss(batch) if beside else sk.call_as_forward(policy, partial(loss, batch))
        sk.scale_for_gradient_mean(out.loss).backward()


UNTIED: dict[str, Wrapper] = {
    "ddp": by_ddp,
    "accelerate": by_accelerate,
    "fsdp2": by_fsdp2,
    "fsdp2 that adds up": by_fsdp2_that_adds_up,
    "fsdp2, one module": by_fsdp2_of_a_module,
    "fsdp2, norm and head": by_fsdp2_with_norm_and_head,
    "fsdp2, head within": partial(by_fsdp2_of_a_head, beside=False),
    "fsdp2, head beside": partial(by_fsdp2_of_a_head, beside=True),
}
TIED: dict[str, Wrapper] = {
    "ddp": by_ddp,
    "accelerate": by_accelerate,
    "fsdp2": by_fsdp2,
    "fsdp2 that adds up": by_fsdp2_that_adds_up,
    "fsdp2, one module": by_fsdp2_of_a_module,
    "fsdp2, embedding and head": by_fsdp2_with_embedding_and_head,
}
