"""The policy branch: token losses on ``[n]`` vectors, to be minimised; only ``log_probs`` carry gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CLIPPED_RATIO_LOSSES = ("grpo", "gspo", "luspo")
# Those whose rho is of the sequence.
SEQUENCE_LOSSES = ("gspo", "luspo")
# No log-ratio beyond it enters an exponential, whatever the clamp: fp32 would overflow.
LARGEST_LOG_RATIO = 80.0


def log_ratio(log_probs: Tensor, old_log_probs: Tensor | None, clamp: float | None = None) -> Tensor:
    """``log rho = logp - old_logp``, clamped to ±``clamp``; ``old_logp = sg(logp)`` where there is none."""
    old_log_probs = log_probs.detach() if old_log_probs is None else old_log_probs
    bound = LARGEST_LOG_RATIO if clamp is None else min(clamp, LARGEST_LOG_RATIO)
    return (log_probs - old_log_probs).clamp(-bound, bound)


def sequence_sum(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """Each row gets the sum of ``values`` over the rows that share its sequence id."""
    ids, index = torch.unique(sequence_ids, return_inverse=True)
    sums = values.new_zeros(len(ids)).index_add(0, index.flatten(), values.flatten())
    return sums[index]


def sequence_mean(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """Each row gets the mean of ``values`` over the rows that share its sequence id."""
    return sequence_sum(values, sequence_ids) / sequence_sum(torch.ones_like(values), sequence_ids)


def clipped_loss(
    ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float, delta: float | None = None
) -> Tensor:
    """``-min(min(rho, delta) A, clip(rho, 1 - eps_low, 1 + eps_high) A)``: GRPO, or GSPO at its rho."""
    unclipped = ratio if delta is None else ratio.clamp(max=delta)
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    return -torch.minimum(unclipped * advantages, clipped * advantages)


def dual_clip_binds(loss: Tensor, advantages: Tensor, dual_clip: float) -> Tensor:
    """Where ``A < 0`` and the bound ``-dual_clip · A`` is below the clipped loss."""
    return (advantages < 0) & (-dual_clip * advantages < loss)


def cispo_loss(ratio: Tensor, log_probs: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float) -> Tensor:
    """``-sg(clip(rho, 1 - eps_low, 1 + eps_high)) A logp``."""
    return -ratio.detach().clamp(1 - epsilon_low, 1 + epsilon_high) * advantages * log_probs


def sapo_temperature(advantages: Tensor, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Tensor:
    """tau: 1.0 for A > 0, else 1.05."""
    return torch.where(advantages > 0, torch.full_like(advantages, tau_positive), tau_negative)


def sapo_loss(ratio: Tensor, advantages: Tensor, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Tensor:
    """``-A sigmoid(tau (rho - 1)) 4 / tau``."""
    tau = sapo_temperature(advantages, tau_positive, tau_negative)
    return -advantages * torch.sigmoid(tau * (ratio - 1)) * 4 / tau


def reinforce_loss(log_probs: Tensor, advantages: Tensor) -> Tensor:
    """``-A logp``."""
    return -advantages * log_probs


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, kl_type: str, clamp: float | None = None) -> Tensor:
    """KL(p‖ref) from one sample, ``d = logp - ref``: k1 ``d``, k2 ``½ d²``, k3 ``exp(-d) + d - 1``.

    In k3, which has the exponential, d is clamped like the policy's log-ratio.
    """
    difference = log_probs - ref_log_probs
    if kl_type == "k1":
        return difference
    if kl_type == "k2":
        return difference**2 / 2
    if kl_type == "k3":
        difference = log_ratio(log_probs, ref_log_probs, clamp)
        return torch.expm1(-difference) + difference
    raise ValueError(f"kl_type: unknown, {kl_type!r}")


def approx_kl(log_probs: Tensor, old_log_probs: Tensor, clamp: float | None) -> Tensor:
    """KL(old‖p) from one sample: ``rho - 1 - log rho``."""
    value = log_ratio(log_probs, old_log_probs, clamp)
    return torch.expm1(value) - value


def importance_ratio(log_probs: Tensor, old_log_probs: Tensor | None, sequence_ids: Tensor, config: Any) -> Tensor:
    """``rho = exp(log rho)``; for ``gspo`` of the sequence's mean log-ratio, gradient through the mean."""
    value = log_ratio(log_probs, old_log_probs, config.log_ratio_clamp)
    if config.loss_type in SEQUENCE_LOSSES:
        value = sequence_mean(value, sequence_ids)
    return value.exp()


def policy_loss(
    ratio: Tensor, log_probs: Tensor, advantages: Tensor, config: Any, sequence_ids: Tensor | None = None
) -> Tensor:
    """The token loss of ``config.loss_type``, before is-weights, KL and entropy terms."""
    if config.loss_type == "cispo":
        return cispo_loss(ratio, log_probs, advantages, config.epsilon_low, config.epsilon_high)
    if config.loss_type == "sapo":
        return sapo_loss(ratio, advantages, **dict(getattr(config, "loss_options", ())))
    if config.loss_type == "reinforce":
        return reinforce_loss(log_probs, advantages)
    if config.loss_type not in CLIPPED_RATIO_LOSSES:
        raise ValueError(f"loss_type: unknown, {config.loss_type!r}")
    loss = clipped_loss(ratio, advantages, config.epsilon_low, config.epsilon_high, config.delta)
    if config.dual_clip is not None:
        bound = -config.dual_clip * advantages
        loss = torch.where(dual_clip_binds(loss, advantages, config.dual_clip), bound, loss)
    if config.loss_type == "luspo":
        if sequence_ids is None:
            raise ValueError("sequence_ids: luspo needs them, got None")
        loss = loss * sequence_sum(torch.ones_like(loss), sequence_ids)
    return loss


def clip_counts(ratio: Tensor, advantages: Tensor, config: Any) -> dict[str, Tensor]:
    """How many tokens each clip binds: only those whose gradient it stops, but all of ``cispo``'s."""
    low, high = ratio < 1 - config.epsilon_low, ratio > 1 + config.epsilon_high
    dual = torch.zeros_like(low)
    if config.loss_type in CLIPPED_RATIO_LOSSES:
        if config.dual_clip is not None:
            loss = clipped_loss(ratio, advantages, config.epsilon_low, config.epsilon_high, config.delta)
            dual = dual_clip_binds(loss, advantages, config.dual_clip)
        low, high = low & (advantages < 0), high & (advantages > 0)
    elif config.loss_type == "cispo":
        low, high = low & (advantages != 0), high & (advantages != 0)
    else:
        low, high = torch.zeros_like(low), torch.zeros_like(high)
    return {"clip_low_count": low.sum(), "clip_high_count": high.sum(), "dual_clip_count": dual.sum()}
