"""Which rollout goes to which branch, and with what advantage."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from srpo_kernels.config import require_number
from srpo_kernels.types import Routing, wide_dtype

AdvantageScale = Literal["none", "group", "batch"]

ADVANTAGE_SCALES: tuple[AdvantageScale, ...] = get_args(AdvantageScale)


def route_samples(
    rewards: Tensor,
    group_ids: Tensor,
    success_threshold: float = 0.5,
    feedback_available: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Routing:
    """Send failed rollouts that can be taught to distillation and all others to the policy branch.

    ``correct = rewards >= success_threshold``; ``sdpo_mask = not correct and (a correct sibling or feedback)``, where a
    sibling is another rollout of the same group. A failed rollout of an all-failed group stays in the policy branch.

    ``rewards``: ``[B]``, any real dtype. ``group_ids``: ``[B]``, any integers; the members of a group need not be
    adjacent. ``feedback_available``: ``[B]`` bool, true where feedback can teach a rollout that has no correct sibling.
    ``generator``: draws the teachers, uniformly among the correct siblings.

    Returns a ``Routing`` on the device of ``rewards``. ``teacher_index`` is drawn for correct rollouts too; it is -1
    where there is no correct sibling, also where ``sdpo_mask`` is true because of feedback.

    Raises TypeError or ValueError for a wrong type, shape, dtype or device, and for a reward that is not finite.

    Source: SRPO (arXiv 2604.02288), section 3.1, appendix B.5 and table 7.
    """
    _check_groups(rewards, group_ids)
    require_number("success_threshold", success_threshold, "to compare rewards with", lambda value: True)
    if feedback_available is not None:
        _check_like_rewards("feedback_available", feedback_available, rewards)
        if feedback_available.dtype != torch.bool:
            raise TypeError(f"feedback_available must be bool, got {feedback_available.dtype}")

    correct = rewards >= success_threshold
    _, group, group_size = group_ids.unique(return_inverse=True, return_counts=True)
    num_correct = torch.zeros_like(group_size).index_add_(0, group, correct.to(group_size.dtype))

    # Groups one after the other, the correct rollouts of each group first: `rank` counts within the group.
    order = (2 * group + (~correct).to(group.dtype)).argsort(stable=True)
    start = group_size.cumsum(0) - group_size
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    rank -= start[group]

    num_siblings = num_correct[group] - correct.to(group.dtype)
    draw_device = rewards.device if generator is None else generator.device
    draws = torch.rand(len(rewards), generator=generator, device=draw_device).to(rewards.device)
    # A draw just below 1 times the count can round up to the count.
    choice = torch.minimum((draws * num_siblings).long(), num_siblings - 1)
    # A correct rollout skips itself.
    choice += correct & (choice >= rank)
    teachable = num_siblings > 0
    teacher_index = torch.where(teachable, order[start[group] + choice.clamp(min=0)], -1)

    if feedback_available is not None:
        teachable = teachable | feedback_available
    return Routing(sdpo_mask=~correct & teachable, teacher_index=teacher_index, correct=correct)


def group_advantages(
    rewards: Tensor, group_ids: Tensor, scale: AdvantageScale = "none", eps: float = 1e-4
) -> Tensor:
    """The reward of each rollout relative to its group.

    ``A = (r - mean_group) / d`` with ``d = 1`` for ``scale="none"``, ``std_group + eps`` for ``"group"`` and
    ``std_batch + eps`` for ``"batch"``. Standard deviations are the unbiased ones (n - 1).

    ``rewards``: ``[B]``, any real dtype. ``group_ids``: ``[B]``, any integers; the members of a group need not be
    adjacent. ``eps``: positive, in units of reward.

    Returns ``[B]`` on the device of ``rewards``, float64 for float64 rewards and float32 otherwise, without gradient.
    A group of equal rewards, and so a group of one, has advantage exactly 0: its tokens are then skipped by the loss.

    Raises TypeError or ValueError for a wrong type, shape, dtype or device, and for a reward that is not finite.

    Source: SRPO (arXiv 2604.02288), section 3.1; ``"none"`` is Dr. GRPO (arXiv 2503.20783), section 3.2.
    """
    _check_groups(rewards, group_ids)
    require_number("eps", eps, "> 0", lambda value: value > 0)
    if scale not in ADVANTAGE_SCALES:
        raise ValueError(f"scale must be one of {ADVANTAGE_SCALES}, got {scale!r}")

    values = rewards.detach().to(wide_dtype(rewards.device))
    _, group, group_size = group_ids.unique(return_inverse=True, return_counts=True)
    per_group = values.new_zeros(len(group_size))
    # Measured from the lowest of the group, equal rewards are zeros and their mean rounds to nothing else.
    above_lowest = values - per_group.scatter_reduce(0, group, values, "amin", include_self=False)[group]
    mean = per_group.index_add(0, group, above_lowest) / group_size
    advantages = above_lowest - mean[group]

    if scale == "group":
        variance = per_group.index_add(0, group, advantages.square()) / (group_size - 1).clamp(min=1)
        advantages = advantages / (variance.sqrt()[group] + eps)
    elif scale == "batch":
        deviations = values - values.mean()
        variance = deviations.square().sum() / max(len(values) - 1, 1)
        advantages = advantages / (variance.sqrt() + eps)
    return advantages.to(torch.float64 if rewards.dtype == torch.float64 else torch.float32)


def _check_groups(rewards: Tensor, group_ids: Tensor) -> None:
    if not isinstance(rewards, Tensor):
        raise TypeError(f"rewards must be a tensor, got {type(rewards).__name__}")
    if rewards.is_complex():
        raise TypeError(f"rewards must be real, got {rewards.dtype}")
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have shape [B], got {list(rewards.shape)}")
    if rewards.is_floating_point() and not rewards.isfinite().all():
        raise ValueError(f"rewards must be finite, got {rewards.tolist()}")
    _check_like_rewards("group_ids", group_ids, rewards)
    if group_ids.is_floating_point() or group_ids.is_complex() or group_ids.dtype == torch.bool:
        raise TypeError(f"group_ids must be integers, got {group_ids.dtype}")


def _check_like_rewards(name: str, value: Tensor, rewards: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.shape != rewards.shape:
        raise ValueError(
            f"{name} must have the shape of rewards, {list(rewards.shape)}, got {list(value.shape)}"
        )
    if value.device != rewards.device:
        raise ValueError(f"{name} must be on the device of rewards, {rewards.device}, got {value.device}")
