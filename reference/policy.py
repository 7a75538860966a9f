"""The policy branch: token losses on ``[n]`` vectors, to be minimised; only ``log_probs`` carry gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

CLIPPED_RATIO_LOSSES = ("grpo", "gspo", "gspo_token", "luspo", "clip_cov")
# Those whose rho is of the sequence, and those in which a token moves its whole sequence.
SEQUENCE_RATIO_LOSSES = ("gspo", "gspo_token", "luspo")
SEQUENCE_LOSSES = (*SEQUENCE_RATIO_LOSSES, "gmpo", "vespo")
# Those that are not 0 where the advantage is.
ALWAYS_ACTIVE_LOSSES = ("ipo", "dro", "clip_cov", "kl_cov")
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


def in_trust_region(lower: Tensor, upper: Tensor, advantages: Tensor) -> Tensor:
    """Where a step may go on: not ``upper`` where A > 0, not ``lower`` where A < 0."""
    return torch.where(advantages > 0, ~upper, ~(lower & (advantages < 0)))


def dppo_bounds(
    log_probs: Tensor, old_log_probs: Tensor, epsilon_low: float, epsilon_high: float, kind: str
) -> tuple[Tensor, Tensor]:
    """Which tokens have fallen or risen too far, by ``|pi - mu|`` or by ``KL(Bernoulli(mu) ‖ Bernoulli(pi))``."""
    pi, mu = log_probs.detach().exp(), old_log_probs.exp()
    if kind == "dppo_tv":
        return pi - mu < -epsilon_low, pi - mu > epsilon_high
    # 1 - pi, which is rounded away where pi is nearly 1; a rounded log-prob may be above 0.
    rest, old_rest = (torch.expm1(x.clamp(max=0)).abs() for x in (log_probs.detach(), old_log_probs))
    divergence = mu * (old_log_probs - log_probs.detach()) + old_rest * ((old_rest + 1e-8) / (rest + 1e-8)).log()
    return (divergence > epsilon_low) & (pi < mu), (divergence > epsilon_high) & (pi > mu)


def gmpo_log_ratio(value: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float) -> Tensor:
    """``sgn(A) min(sgn(A) l, sgn(A) clip(l, -eps_low, eps_high))``; l itself where A is 0."""
    clipped = value.clamp(-epsilon_low, epsilon_high)
    return torch.where(
        advantages > 0,
        torch.minimum(value, clipped),
        torch.where(advantages < 0, torch.maximum(value, clipped), value),
    )


def vespo_weight(
    log_w: Tensor, advantages: Tensor, k_positive: float = 2.0, lambda_positive: float = 3.0,
    k_negative: float = 3.0, lambda_negative: float = 2.0,
) -> Tensor:  # fmt: skip
    """``w^k exp(lambda - lambda w)``, by the sign of A."""
    k = torch.where(advantages < 0, torch.full_like(log_w, k_negative), k_positive)
    scale = torch.where(advantages < 0, torch.full_like(log_w, lambda_negative), lambda_positive)
    return torch.exp(scale + k * log_w - scale * log_w.exp())


def covariance(log_probs: Tensor, advantages: Tensor) -> Tensor:
    """``(A - mean A) (logp - mean logp)``."""
    log_probs = log_probs.detach()
    return (advantages - advantages.mean()) * (log_probs - log_probs.mean())


def in_covariance_band(
    values: Tensor, free: Tensor, share: float = 2e-4, cov_low: float = 1.0, cov_high: float = 5.0
) -> Tensor:
    """``max(int(share n), 1)`` of the ``free`` tokens inside the band, at equal distances from the largest down."""
    candidates = (free & (values > cov_low) & (values < cov_high)).nonzero().squeeze(1)
    candidates = candidates[values[candidates].argsort(descending=True, stable=True)]
    m, k = len(candidates), max(int(share * len(values)), 1)
    ranks = [r for r in range(m) if (r + 1) * k // m > r * k // m]
    chosen = torch.zeros_like(free)
    chosen[candidates[ranks]] = True
    return chosen


def straight_through(value: Tensor, gradient_of: Tensor) -> Tensor:
    """The one's value with the other's gradient."""
    return value.detach() + (gradient_of - gradient_of.detach())


def kl_estimate(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    kl_type: str,
    clamp: float | None = None,
    old_log_probs: Tensor | None = None,
) -> Tensor:
    """KL(p‖ref) from one sample, ``d = logp - ref``: k1 ``d``, k2 ``½ d²``, k3 ``exp(-d) + d - 1``.

    In k3, which has the exponential, d is clamped like the policy's log-ratio. A plus has k2's gradient, ``k3_bounded``
    is at most 10, ``k3_weighted`` is ``rho k3``.
    """
    difference = log_probs - ref_log_probs
    clamped = log_ratio(log_probs, ref_log_probs, clamp)
    k1, k2, k3 = difference, difference**2 / 2, torch.expm1(-clamped) + clamped
    if kl_type == "k1":
        return k1
    if kl_type == "k2":
        return k2
    if kl_type == "k3":
        return k3
    if kl_type == "k1+":
        return straight_through(k1, k2)
    if kl_type == "k3+":
        return straight_through(k3, k2)
    if kl_type == "k3_bounded":
        return k3.clamp(max=10)
    if kl_type == "k3_weighted":
        # The product of two exponentials: half of what one may have.
        clamp = min(LARGEST_LOG_RATIO / 2, LARGEST_LOG_RATIO if clamp is None else clamp)
        clamped = log_ratio(log_probs, ref_log_probs, clamp)
        return log_ratio(log_probs, old_log_probs, clamp).exp() * (torch.expm1(-clamped) + clamped)
    raise ValueError(f"kl_type: unknown, {kl_type!r}")


def approx_kl(log_probs: Tensor, old_log_probs: Tensor, clamp: float | None) -> Tensor:
    """KL(old‖p) from one sample: ``rho - 1 - log rho``."""
    value = log_ratio(log_probs, old_log_probs, clamp)
    return torch.expm1(value) - value


def importance_ratio(log_probs: Tensor, old_log_probs: Tensor | None, sequence_ids: Tensor, config: Any) -> Tensor:
    """``rho = exp(log rho)``; for ``gspo`` of the sequence's mean log-ratio, gradient through the mean.

    In ``gspo_token`` the gradient is that of the token's own log-prob.
    """
    value = log_ratio(log_probs, old_log_probs, config.log_ratio_clamp)
    if config.loss_type in SEQUENCE_RATIO_LOSSES:
        value = sequence_mean(value, sequence_ids)
    if config.loss_type == "gspo_token":
        value = straight_through(value, log_probs)
    return value.exp()


def clip_masks(
    log_probs: Tensor, old_log_probs: Tensor | None, advantages: Tensor, config: Any, sequence_ids: Tensor
) -> dict[str, Tensor]:
    """Where each clip binds, bool: only tokens whose gradient it stops, but all of ``cispo``'s and ``ipo``'s."""
    ratio = importance_ratio(log_probs, old_log_probs, sequence_ids, config).detach()
    old = log_probs.detach() if old_log_probs is None else old_log_probs
    low, high = ratio < 1 - config.epsilon_low, ratio > 1 + config.epsilon_high
    dual = torch.zeros_like(low)
    if config.loss_type in CLIPPED_RATIO_LOSSES and config.dual_clip is not None:
        loss = clipped_loss(ratio, advantages, config.epsilon_low, config.epsilon_high, config.delta)
        dual = dual_clip_binds(loss, advantages, config.dual_clip)
    if config.loss_type in ("dppo_tv", "dppo_kl"):
        low, high = dppo_bounds(log_probs, old, config.epsilon_low, config.epsilon_high, config.loss_type)
    elif config.loss_type == "gmpo":
        value = log_ratio(log_probs.detach(), old, config.log_ratio_clamp)
        low, high = value < -config.epsilon_low, value > config.epsilon_high
    elif config.loss_type == "ipo":
        threshold = own_options(config).get("threshold", 0.1)
        low, high = dppo_bounds(log_probs, old, threshold, threshold, "dppo_tv")
    elif config.loss_type not in (*CLIPPED_RATIO_LOSSES, "cispo"):
        low, high = torch.zeros_like(low), torch.zeros_like(high)
    if config.loss_type in ("cispo", "ipo"):
        low, high = low & (advantages != 0), high & (advantages != 0)
    else:
        low, high = low & (advantages < 0), high & (advantages > 0)
    return {"clip_low": low, "clip_high": high, "dual_clip": dual}


def own_options(config: Any) -> dict[str, Any]:
    """The options of a loss's own."""
    return dict(getattr(config, "loss_options", ()))


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor | None, advantages: Tensor, config: Any, sequence_ids: Tensor
) -> Tensor:
    """The token loss of ``config.loss_type``, before is-weights, KL and entropy terms.

    Losses of single tokens do not read ``sequence_ids``.
    """
    options, old = own_options(config), log_probs.detach() if old_log_probs is None else old_log_probs
    value = log_ratio(log_probs, old_log_probs, config.log_ratio_clamp)
    ratio = importance_ratio(log_probs, old_log_probs, sequence_ids, config)
    if config.loss_type == "cispo":
        return cispo_loss(ratio, log_probs, advantages, config.epsilon_low, config.epsilon_high)
    if config.loss_type == "sapo":
        return sapo_loss(ratio, advantages, **options)
    if config.loss_type == "reinforce":
        return reinforce_loss(log_probs, advantages)
    if config.loss_type in ("dppo_tv", "dppo_kl"):
        bounds = dppo_bounds(log_probs, old, config.epsilon_low, config.epsilon_high, config.loss_type)
        weight = ratio.detach().clamp(max=options.get("ratio_max", 20.0))
        return reinforce_loss(log_probs, advantages) * weight * in_trust_region(*bounds, advantages)
    if config.loss_type == "ipo":
        threshold, penalty = float(options.get("threshold", 0.1)), float(options.get("penalty", 1e-3))
        bounds = dppo_bounds(log_probs, old, threshold, threshold, "dppo_tv")
        return -ratio * advantages * ~(bounds[0] | bounds[1]) + penalty * value**2
    if config.loss_type == "dro":
        return reinforce_loss(log_probs, advantages) + float(options.get("beta", 0.1)) / 2 * value**2
    if config.loss_type == "gmpo":
        clipped = gmpo_log_ratio(value, advantages, config.epsilon_low, config.epsilon_high)
        return -advantages * sequence_mean(clipped, sequence_ids).exp()
    if config.loss_type == "vespo":
        log_w = sequence_sum(value.detach(), sequence_ids).clamp(math.log(1e-8), 20)
        return reinforce_loss(log_probs, advantages) * vespo_weight(log_w, advantages, **options)
    if config.loss_type == "kl_cov":
        covariances = covariance(log_probs, advantages)
        count = min(max(int(options.get("share", 2e-4) * len(covariances)), 1), len(covariances))
        chosen = torch.zeros_like(covariances, dtype=torch.bool)
        chosen[covariances.argsort(descending=True, stable=True)[:count]] = True
        return -ratio * advantages + float(options.get("coefficient", 1.0)) * value.abs() * chosen
    if config.loss_type not in CLIPPED_RATIO_LOSSES:
        raise ValueError(f"loss_type: unknown, {config.loss_type!r}")
    loss = clipped_loss(ratio, advantages, config.epsilon_low, config.epsilon_high, config.delta)
    if config.dual_clip is not None:
        bound = -config.dual_clip * advantages
        loss = torch.where(dual_clip_binds(loss, advantages, config.dual_clip), bound, loss)
    if config.loss_type == "luspo":
        loss = loss * sequence_sum(torch.ones_like(loss), sequence_ids)
    if config.loss_type == "clip_cov":
        masks = clip_masks(log_probs, old_log_probs, advantages, config, sequence_ids)
        free = ~(masks["clip_low"] | masks["clip_high"])
        loss = loss * ~in_covariance_band(covariance(log_probs, advantages), free, **options)
    return loss
