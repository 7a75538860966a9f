"""Corrections for rollouts of another policy: detached weights of rows, from ``l = old_logp - rollout_logp``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .policy import LARGEST_LOG_RATIO, sequence_mean, sequence_sum


def known(log_ratio: Tensor) -> Tensor:
    """0 where the rollout's log-prob is not known, which is NaN."""
    return torch.where(log_ratio.isnan(), torch.zeros_like(log_ratio), log_ratio)


def sequence_max(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """Each row gets the largest of ``values`` over the rows that share its sequence id."""
    same = sequence_ids[:, None] == sequence_ids
    return torch.where(same, values, -torch.inf).amax(1) if len(values) else values


def over_scope(scope: str, values: Tensor, sequence_ids: Tensor) -> Tensor:
    """The values themselves, or their sum, mean or maximum over the sequence."""
    if scope == "token":
        return values
    if scope in ("sequence", "seq_sum"):
        return sequence_sum(values, sequence_ids)
    if scope in ("geometric", "seq_mean"):
        return sequence_mean(values, sequence_ids)
    if scope == "seq_max":
        return sequence_max(values, sequence_ids)
    raise ValueError(f"scope: unknown, {scope!r}")


def estimate(kind: str, log_ratio: Tensor) -> Tensor:
    """k1 is l, k2 is ``½ l²``, k3 is ``exp(l) - l - 1``."""
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio**2 / 2
    if kind == "k3":
        bounded = log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
        return torch.expm1(bounded) - bounded
    raise ValueError(f"masks: unknown, {kind!r}")


def rollout_weights(log_ratio: Tensor, sequence_ids: Tensor, correction: Any) -> tuple[Tensor, Tensor]:
    """The weights of rows, 0 for those that are left out, and which are held at a bound."""
    log_ratio = known(log_ratio)
    level = correction.level
    score = torch.zeros_like(log_ratio) if level is None else over_scope(level, log_ratio, sequence_ids)
    bounds = torch.tensor([-20.0, 20.0], dtype=log_ratio.dtype, device=log_ratio.device)
    if level is not None and correction.weight_min is not None:
        bounds[0] = torch.tensor(correction.weight_min, dtype=torch.float64).log()
    if level is not None and correction.weight_max is not None:
        bounds[1] = torch.tensor(correction.weight_max, dtype=torch.float64).log()
    outside = (score < bounds[0]) | (score > bounds[1])
    weights = torch.minimum(torch.maximum(score, bounds[0]), bounds[1]).exp()
    dropped = outside if correction.outside == "zero" else torch.zeros_like(outside)
    for name, low, high in correction.masks:
        scope, kind = name.rsplit("_", 1)
        values = over_scope(scope, estimate(kind, log_ratio), sequence_ids)
        if low is not None:
            dropped = dropped | (values < low)
        if high is not None:
            dropped = dropped | (values > high)
    return torch.where(dropped, torch.zeros_like(weights), weights), outside & ~dropped


def off_policy_rows(
    log_probs: Tensor, rollout_log_probs: Tensor, advantages: Tensor, sequence_ids: Tensor, threshold: float
) -> Tensor:
    """Rows with ``A < 0`` whose sequence has a mean of ``rollout_logp - logp`` above the threshold."""
    gap = known(rollout_log_probs - log_probs.detach())
    return (advantages < 0) & (sequence_mean(gap, sequence_ids) > threshold)


def correct(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    rollout_log_probs: Tensor,
    advantages: Tensor,
    valid: Tensor,
    policy_rows: Tensor,
    sequence_ids: Tensor,
    correction: Any,
) -> tuple[Tensor, Tensor]:
    """The weights of the valid rows, and which are held at a bound, in the rows' shape; 0 elsewhere.

    Off-policy sequence masking looks at the ``policy_rows`` alone.
    """
    numerator = log_probs if old_log_probs is None else old_log_probs.to(log_probs)
    ids = sequence_ids[valid]
    some = rollout_weights((numerator - rollout_log_probs)[valid].detach(), ids, correction)
    weights, clipped = torch.zeros_like(log_probs), torch.zeros_like(valid)
    weights[valid], clipped[valid] = some
    if correction.off_policy_threshold is not None:
        rows = policy_rows
        dropped = torch.zeros_like(valid)
        dropped[rows] = off_policy_rows(
            log_probs[rows],
            rollout_log_probs[rows],
            advantages[rows],
            sequence_ids[rows],
            correction.off_policy_threshold,
        )
        weights, clipped = weights.masked_fill(dropped, 0), clipped & ~dropped
    return weights, clipped


def sums(weights: Tensor, clipped: Tensor) -> dict[str, Tensor]:
    """The metrics of rows."""
    return {
        "rollout_tokens": torch.tensor(len(weights)),
        "rollout_weight_sum": weights.sum(),
        "rollout_clipped_count": clipped.sum(),
        "rollout_dropped_count": (weights == 0).sum(),
    }
