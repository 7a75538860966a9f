"""What the rewards of a generation batch say: who is correct, who is distilled, and where there is nothing to learn.

Rewards are those that TRL gathers: ``[B, F]`` of F reward functions, over all processes, groups one after the other,
NaN where a function gave none.
"""

from __future__ import annotations

import torch
from torch import Tensor

import srpo_kernels as sk


def equal_groups(rewards: Tensor, weights: Tensor, group_size: int, aggregation: str) -> Tensor:
    """``[B]`` bool on the CPU: completions of groups whose largest reward is their least.

    Their advantages are 0; TRL's are the rounding of a mean, which Adam scales up to whole steps. A reward is the sum
    that TRL forms by ``aggregation`` with ``weights`` ``[F]``, without the completions that no function scored. Sums of
    several rewards are equal up to the rounding of the rewards to fp32: 0.1 + 0.2 and 0.3 + 0.0 are.
    """
    rewards, weights = rewards.cpu().double().unflatten(0, (-1, group_size)), weights.cpu().double()
    deviations, scale = rewards, weights
    if aggregation == "normalize_then_sum":
        # Equal fp32 numbers are their mean exactly in fp64.
        deviations = rewards - rewards.nanmean(1, keepdim=True)
        count = rewards.isfinite().sum(1, keepdim=True)
        std = (deviations.square().nansum(1, keepdim=True) / (count - 1)).sqrt()
        scale = torch.where(std > 0.0, weights / (std + 1e-4), 0.0)
    totals, unscored = (scale * deviations).nansum(2), rewards.isnan().all(2)
    spread = totals.masked_fill(unscored, -torch.inf).amax(1) - totals.masked_fill(unscored, torch.inf).amin(1)
    rounding = torch.finfo(torch.float32).eps * (scale * rewards).abs().nansum(2).amax(1)
    equal: Tensor = spread <= (rounding if len(weights) > 1 else 0.0)
    return equal.repeat_interleave(group_size)


def correctness_scores(rewards: Tensor, weights: Tensor, deciding: int | None) -> Tensor:
    """``[B]``: the reward of the ``deciding`` function, or the weighted sum; NaN where nobody scored the completion."""
    if deciding is not None:
        return rewards[:, deciding]
    scores: Tensor = (rewards * weights.to(rewards.device)).nansum(1)
    return scores.masked_fill(rewards.isnan().all(1), torch.nan)


def route_completions(
    showable: Tensor, distillable: Tensor, group_size: int, seed: int, has_feedback: Tensor
) -> tuple[Tensor, Tensor]:
    """``[B]`` each: whether a completion is distilled, and the sibling that teaches it, or -1.

    A ``distillable`` completion is distilled where its group has another one that is ``showable``, or where it
    ``has_feedback``, all ``[B]`` bool.
    To the router a correct completion that cannot be shown is a failed one: it must not teach. Every process draws the
    same teachers from one ``seed``.
    """
    group_ids = torch.arange(len(showable), device=showable.device) // group_size
    generator = torch.Generator().manual_seed(seed)
    teacher_index = sk.route_samples(showable.float(), group_ids, generator=generator).teacher_index
    return distillable & ((teacher_index >= 0) | has_feedback), teacher_index
