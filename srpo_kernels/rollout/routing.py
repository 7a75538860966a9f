"""Which rollout goes to which branch, and with what advantage."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from srpo_kernels.checks import BOOL, FLOATING, INTEGER, require_number, require_shape, require_tensor
from srpo_kernels.rows.dtypes import wide_dtype
from srpo_kernels.rows.segments import segment_sums


class Routing(NamedTuple):
    """Where each of ``B`` rollouts goes and who can teach it.

    ``sdpo_mask`` ``[B]`` bool: true for distillation, false for the policy branch. ``teacher_index`` ``[B]``
    int64: another correct rollout of the same group, or -1. ``correct`` ``[B]`` bool.
    """

    sdpo_mask: Tensor
    teacher_index: Tensor
    correct: Tensor


AdvantageScale = Literal["none", "group", "batch"]

ADVANTAGE_SCALES: tuple[AdvantageScale, ...] = get_args(AdvantageScale)


def route_samples(
    rewards: Tensor,
    group_ids: Tensor,
    success_threshold: float = 0.5,
    feedback_available: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Routing:
    """Send failed rollouts that can be taught to distillation, all others to the policy branch.

    ``correct = rewards >= success_threshold`` and ``sdpo_mask = not correct and (has a correct sibling or
    feedback)``, a sibling being another rollout of the same group. A failed rollout of an all-failed group
    stays in the policy branch, where its advantage is 0. Source: SRPO (arXiv 2604.02288), section 3.1,
    appendix B.5 and table 7.

    Args:
        rewards: ``[B]``, floating, integer or bool.
        group_ids: ``[B]``, integers: rollouts of one prompt share a number, in any order.
        success_threshold: the least reward of a correct rollout.
        feedback_available: ``[B]``, bool: rollouts that feedback can teach where no sibling can. None: none.
        generator: draws the teachers, each correct sibling alike. None: the default one of the device.

    Returns:
        ``sdpo_mask``, ``teacher_index`` (for correct rollouts too; -1 where there is no correct sibling,
        feedback or not) and ``correct``, each ``[B]`` on the device of ``rewards``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device, or a reward that is not finite.
    """
    _check_groups(rewards, group_ids)
    require_number("success_threshold", success_threshold, "to compare rewards with", lambda value: True)
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
    if feedback_available is not None:
        require_tensor("feedback_available", feedback_available, BOOL, rewards.device)
        require_shape("feedback_available", feedback_available, [rewards.shape], "that of rewards")

    # Floating rewards are compared in their own dtype: 0.7 in float32 reaches 0.7. Others would wrap the threshold.
    values = rewards if rewards.is_floating_point() else rewards.to(wide_dtype(rewards.device))
    correct = values >= success_threshold
    _, group, group_size = torch.unique(group_ids, return_inverse=True, return_counts=True)
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


def group_advantages(rewards: Tensor, group_ids: Tensor, scale: AdvantageScale = "none", eps: float = 1e-4) -> Tensor:
    """The advantage of each rollout: its reward, relative to its group.

    ``A = (r - mean_group) / d``, where ``d`` is 1 for ``scale="none"``, ``std_group + eps`` for ``"group"``
    and ``std_batch + eps`` for ``"batch"``; the standard deviations are unbiased (n - 1). A group of equal
    rewards, and so a group of one, has advantage exactly 0: the loss skips its tokens. Source: SRPO (arXiv
    2604.02288), section 3.1; ``"none"`` is Dr. GRPO (arXiv 2503.20783).

    Args:
        rewards: ``[B]``, floating, integer or bool.
        group_ids: ``[B]``, integers: rollouts of one prompt share a number, in any order.
        scale: ``"none"``, ``"group"`` or ``"batch"``.
        eps: added to the standard deviation (units of reward); > 0.

    Returns:
        ``[B]`` on the device of ``rewards``, fp32 (fp64 for fp64 rewards), without gradient.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device, an unknown scale, or rewards that are not finite or too far apart.
    """
    _check_groups(rewards, group_ids)
    require_number("eps", eps, "> 0", lambda value: value > 0)
    if scale not in ADVANTAGE_SCALES:
        raise ValueError(f"scale must be one of {ADVANTAGE_SCALES}, got {scale!r}")

    values = rewards.detach().to(wide_dtype(rewards.device))
    _, group, group_size = torch.unique(group_ids, return_inverse=True, return_counts=True)
    lowest = values.new_zeros(len(group_size)).scatter_reduce(0, group, values, "amin", include_self=False)
    # Measured from the lowest of the group, equal rewards are zeros and their mean rounds to nothing else.
    above_lowest = values - lowest[group]
    mean = segment_sums(above_lowest[None], group, len(group_size))[0] / group_size
    advantages: Tensor = above_lowest - mean[group]

    if scale == "group":
        squares = segment_sums(advantages.square()[None], group, len(group_size))[0]
        variance = squares / (group_size - 1).clamp(min=1)
        advantages = advantages / (variance.sqrt()[group] + eps)
    elif scale == "batch":
        deviations = values - values.mean()
        variance = deviations.square().sum() / max(len(values) - 1, 1)
        advantages = advantages / (variance.sqrt() + eps)
    advantages = advantages.to(torch.float64 if rewards.dtype == torch.float64 else torch.float32)
    if not advantages.isfinite().all():
        raise ValueError(f"rewards must have differences and squares that float64 holds, got {rewards.tolist()}")
    return advantages


def _check_groups(rewards: Tensor, group_ids: Tensor) -> None:
    require_tensor("rewards", rewards, FLOATING + INTEGER + BOOL)
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have shape [B], got {list(rewards.shape)}")
    if not rewards.isfinite().all():
        raise ValueError(f"rewards must be finite, got {rewards.tolist()}")
    require_tensor("group_ids", group_ids, INTEGER, rewards.device)
    require_shape("group_ids", group_ids, [rewards.shape], "that of rewards")
