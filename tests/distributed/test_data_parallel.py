"""Trainers on several ranks: every parameter's gradient is that of one process with the whole batch."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import reference
import srpo_kernels as sk
from tests.comparison import largest
from tests.processes import needs_gloo, run_ranks

pytest.importorskip("transformers", reason="the wrapped model is one of transformers")
pytest.importorskip("accelerate", reason="accelerate is one of the wrappers")


from examples.distributed.rollouts import (
    Rollouts,
    global_normalizers,
    make_policy,
    make_rollouts,
    make_teacher,
    micro_batch_loss,
    teacher_states,
)
from tests.distributed.ways_to_wrap import TIED, UNTIED, WithLoss

pytestmark = needs_gloo

Gradients = dict[str, Tensor]
COUNT = 14
CONFIGS = {
    "paper": sk.SRPOConfig(),
    "sequence": sk.SRPOConfig(reduction="sequence", loss_type="gspo", dw_beta=3.0),
    "constant": sk.SRPOConfig(reduction="constant", max_length=11, entropy_coef=0.1),
}


def random_split(world_size: int, accumulation: int) -> list[list[Tensor]]:
    """The rollouts of each rank's micro-batches: unequal numbers of them, at least one."""
    generator = torch.Generator().manual_seed(accumulation)
    cells = world_size * accumulation
    order = torch.randperm(COUNT, generator=generator)
    ends = torch.randperm(COUNT - 1, generator=generator)[: cells - 1].sort().values + 1
    parts = order.tensor_split(ends)
    return [list(parts[rank * accumulation : (rank + 1) * accumulation]) for rank in range(world_size)]


def lopsided_splits(world_size: int) -> Iterator[list[list[Tensor]]]:
    """Rank 0 alone distills; the last rank has no valid row."""
    rollouts, distilled = torch.arange(COUNT), COUNT // 3
    yield [[rollouts[:distilled]], *([part] for part in rollouts[distilled:].tensor_split(world_size - 1))]
    yield [*([part] for part in rollouts[:-1].tensor_split(world_size - 1)), [rollouts[-1:]]]


def whole_batch_gradients(
    policy: nn.Module, teacher: nn.Module, rollouts: Rollouts, config: sk.SRPOConfig
) -> Gradients:
    """The gradients of the oracle's loss of the whole batch."""
    loss = reference.srpo_loss(
        policy.model(rollouts.ids).last_hidden_state[:, :-1],
        policy.lm_head.weight,
        rollouts.ids[:, 1:],
        advantages=rollouts.advantages,
        mask=rollouts.mask,
        sdpo_mask=rollouts.sdpo_mask,
        teacher_hidden=teacher_states(teacher, rollouts),
        teacher_weight=teacher.lm_head.weight,
        old_log_probs=rollouts.old_log_probs,
        config=config,
    ).loss
    loss.backward()
    return {name: x.grad for name, x in policy.named_parameters() if x.requires_grad}


def whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def worst_error(policy: nn.Module, expected: Gradients) -> float:
    """The largest error of a gradient, relative to the parameter's largest one."""
    actual = {name: x.grad for name, x in policy.named_parameters() if x.requires_grad}
    assert actual.keys() == expected.keys()
    errors = [largest(whole(actual[name]) - grad) / largest(grad) for name, grad in expected.items()]
    return max(errors)


class Step(NamedTuple):
    """One optimizer step: how the policy is made and wrapped, and who computes which rollouts."""

    wrapper: str
    split: list[list[Tensor]]
    config: sk.SRPOConfig = CONFIGS["paper"]
    tied: bool = False
    frozen_head: bool = False
    dtype: torch.dtype = torch.float64

    def error(self, rank: int) -> float:
        """The worst error of a gradient on this rank."""
        policy = make_policy(tied=self.tied).to(self.dtype)
        teacher = make_teacher(policy)
        policy.lm_head.weight.requires_grad_(not self.frozen_head)
        rollouts = make_rollouts(COUNT, seed=len(self.split[0]))
        rollouts = Rollouts._make(x.to(self.dtype) if x.is_floating_point() else x for x in rollouts)
        expected = whole_batch_gradients(copy.deepcopy(policy), teacher, rollouts, self.config)
        wrap = (TIED if self.tied else UNTIED)[self.wrapper]
        wrap(policy, teacher, [rollouts.select(part) for part in self.split[rank]], self.config)
        return worst_error(policy, expected)


def few_steps(world_size: int) -> list[Step]:
    """What a quick run has time for."""
    one, two, three = (random_split(world_size, accumulation) for accumulation in (1, 2, 3))
    one_distills, one_is_empty = lopsided_splits(world_size)
    return [
        Step("ddp", two, tied=True),
        Step("accelerate", three, CONFIGS["sequence"]),
        Step("fsdp2", one_distills, tied=True),
        Step("fsdp2", one_is_empty, dtype=torch.float32),
        Step("fsdp2, head beside", one, CONFIGS["constant"]),
    ]


def every_step(world_size: int) -> list[Step]:
    cases = []
    for i, (tied, wrapper) in enumerate([*product([False], UNTIED), *product([True], TIED)]):
        # Every way to wrap meets two of the three configurations.
        for accumulation in (1 + i % 3, 1 + (i + 1) % 3):
            config = list(CONFIGS.values())[accumulation - 1]
            cases.append(Step(wrapper, random_split(world_size, accumulation), config, tied=tied))
    wrappers = ("ddp", "fsdp2", "fsdp2, head beside")
    cases += [Step(wrapper, split) for wrapper in wrappers for split in lopsided_splits(world_size)]
    split = random_split(world_size, 2)
    cases += [Step(wrapper, split, frozen_head=True) for wrapper in wrappers]
    return cases + [Step(wrapper, split, dtype=torch.float32) for wrapper in (*wrappers, "accelerate")]


def mixed_precision() -> tuple[float, str]:
    """FSDP in bf16: the error of the gradients, and the message when normalizers pass through its cast."""
    policy, config, rank = make_policy(), CONFIGS["paper"], dist.get_rank()
    teacher, rollouts = make_teacher(policy), make_rollouts(COUNT)
    expected = whole_batch_gradients(copy.deepcopy(policy), teacher, rollouts, config)
    mine = rollouts.select(slice(rank, None, dist.get_world_size()))
    normalizers = global_normalizers(teacher, [mine], config)
    module = WithLoss(policy)
    fully_shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    with pytest.raises(TypeError) as refused:
        module(mine, teacher, normalizers, config)
    module.reset_iter_state()
    out = sk.call_as_forward(module, partial(micro_batch_loss, policy, mine, teacher, normalizers, config))
    sk.scale_for_gradient_mean(out.loss).backward()
    return worst_error(policy, expected), str(refused.value)


def work(rank: int, cases: list[Step]) -> tuple[list[float], tuple[float, str]]:
    # What a launcher tells accelerate; the process group is there, so nothing listens at the address.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(dist.get_world_size())}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    return [case.error(rank) for case in cases], mixed_precision()


@pytest.mark.parametrize(
    ("world_size", "steps"),
    [
        (2, few_steps),
        pytest.param(2, every_step, marks=pytest.mark.slow),
        pytest.param(4, every_step, marks=pytest.mark.slow),
    ],
)
def test_gradients_of_every_parameter_are_those_of_one_process(
    world_size: int, steps: Callable[[int], list[Step]]
) -> None:
    cases = steps(world_size)
    results = run_ranks(work, world_size, cases, timeout_seconds=500)
    for rank, (errors, (error_in_bf16, message)) in enumerate(results):
        for case, error in zip(cases, errors, strict=True):
            assert error <= (1e-11 if case.dtype == torch.float64 else 2e-6), (rank, case, error)
        assert error_in_bf16 < 0.1
        assert message == "normalizers.dw_log_mean must be float32 or float64, got bfloat16"


@pytest.mark.slow
def test_the_programs_run() -> None:
    """DDP and accelerate train alike, to the last digit that they show."""
    shown = {}
    for name in ("ddp", "fsdp2", "accelerate_loop", "sequence_parallel"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
        program = subprocess.run(
            [*command, f"examples.distributed.{name}"], capture_output=True, text=True, timeout=200, check=True
        )
        shown[name] = [line for line in program.stdout.splitlines() if "loss" in line]
    assert shown["ddp"] == shown["accelerate_loop"]
    assert [len(lines) for lines in shown.values()] == [3, 3, 3, 1]
