"""Which rollout goes to which branch, and what its advantage is. Paper 3.1, B.5, Table 7."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .logits import working_dtype


class Routing(NamedTuple):
    """bool: ``sdpo_mask [B]`` goes to distillation, ``candidates [B, B]`` j may teach i, ``correct [B]``."""

    sdpo_mask: Tensor
    candidates: Tensor
    correct: Tensor


def route_samples(
    rewards: Tensor,
    group_ids: Tensor,
    success_threshold: float = 0.5,
    feedback_available: Tensor | None = None,
) -> Routing:
    """Send failed rollouts that have a teacher to distillation, all others to the policy branch. Paper 3.1.

    ``sdpo_mask_i = not correct_i and teacher_available_i``, where a teacher is another correct rollout of the
    same group, or feedback. Failed rollouts of an all-failed group stay in the policy branch, advantage 0.
    """
    correct = rewards >= success_threshold
    same_group = group_ids[:, None] == group_ids[None, :]
    oneself = torch.eye(len(rewards), dtype=torch.bool, device=rewards.device)
    candidates = same_group & correct[None, :] & ~oneself
    teacher_available = candidates.any(dim=1)
    if feedback_available is not None:
        teacher_available = teacher_available | feedback_available
    return Routing(~correct & teacher_available, candidates, correct)


def group_advantages(rewards: Tensor, group_ids: Tensor, scale: str = "none", eps: float = 1e-4) -> Tensor:
    """``A_i = (r_i - mean_group) / (std + eps)``, std of the group or the batch; undivided for ``"none"``.

    ``std`` is unbiased (n - 1). A group of equal rewards, a group of one included, has advantage exactly 0: a
    rounding residue of the mean would make its rows count as active.
    """
    if scale not in ("none", "group", "batch"):
        raise ValueError(f"scale: unknown, {scale!r}")
    rewards = rewards.to(working_dtype(rewards))
    advantages = torch.zeros_like(rewards)
    for group in torch.unique(group_ids):
        members = group_ids == group
        group_rewards = rewards[members]
        if group_rewards.min() == group_rewards.max():
            continue
        advantages[members] = group_rewards - group_rewards.mean()
        if scale != "none":
            population = group_rewards if scale == "group" else rewards
            advantages[members] /= population.std() + eps
    return advantages
