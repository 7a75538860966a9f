"""verl (volcengine/verl): its tests of functions on tensors. Its losses are compared by ``python -m tools.peers``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import srpo_kernels as sk
from tools.peers.suites.suite import Suite


def _grpo_advantages(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True, config: object = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    values = sk.group_advantages(
        token_level_rewards.sum(-1), torch.as_tensor(index), eps=epsilon,
        scale="group" if norm_adv_by_std_in_grpo else "none",
    )[:, None] * response_mask  # fmt: skip
    return values, values


SUITE = Suite(
    peer="verl",
    paths=(".",),
    tests=("tests/trainer/ppo/test_core_algos_on_cpu.py",),
    stand_ins={"verl.trainer.ppo.core_algos:compute_grpo_outcome_advantage": _grpo_advantages},
    without=(
        (r"TestRegisterAdvEst", "their registry of estimators"),
        (r"gae", "advantages from a critic's values"),
        (r"rloo", "advantages against the mean of the others"),
    ),
    absent=("ray", "tensordict", "hydra", "omegaconf", "codetiming", "torchdata", "verl.protocol", "verl.workers"),
)
