"""The same derivatives in closed form; the tests hold them to autograd in fp64.

z and y are the transformed logits. A policy loss is differentiated by the log-ratio, whose own derivative by
``logp`` is 1 inside its clamp, or 1 / length for a sequence's mean.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .distillation import log_mixture, reverse_kl
from .logits import entropy
from .policy import LARGEST_LOG_RATIO, log_ratio, sapo_temperature, sequence_mean


def head_grads(logits_grad: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias from that of ``hidden @ weight.T + bias``, ``[n, V]``."""
    return logits_grad @ weight, logits_grad.T @ hidden, logits_grad.sum(0)


def transform_grad(
    x: Tensor, *, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """``d transform / dx = logit_scale · (1 - tanh²) / temperature``."""
    slope = torch.full_like(x, logit_scale / temperature)
    return slope if softcap is None else slope * (1 - torch.tanh(x * logit_scale / softcap) ** 2)


def log_probs_grad(z: Tensor, ids: Tensor, grad: Tensor) -> Tensor:
    """``Σ_k g_k (1[v = k] - p_v)``: policy, sampled and top-k rows are this, for ids and grad ``[n, K]``."""
    return torch.zeros_like(z).scatter_add(-1, ids, grad) - grad.sum(-1, keepdim=True) * z.softmax(-1)


def log_tail_grad(log_probs: Tensor) -> Tensor:
    """``d log(1 - Σ_k p_k) / d log p_k = -p_k / (1 - Σ_k p_k)``: the tail bucket."""
    probs = log_probs.exp()
    return -probs / (1 - probs.sum(-1, keepdim=True))


def entropy_grad(z: Tensor) -> Tensor:
    """``dH(p) / dz_v = -p_v (log p_v + H)``."""
    log_p = z.log_softmax(-1)
    return -log_p.exp() * (log_p + entropy(z)[:, None])


def forward_kl_grad(z: Tensor, y: Tensor) -> Tensor:
    """``dKL(q‖p) / dz_v = p_v - q_v``."""
    return z.softmax(-1) - y.softmax(-1)


def reverse_kl_grad(z: Tensor, y: Tensor) -> Tensor:
    """``dKL(p‖q) / dz_v = p_v (log p_v - log q_v - KL(p‖q))``."""
    log_p, log_q = z.log_softmax(-1), y.log_softmax(-1)
    return log_p.exp() * (log_p - log_q - reverse_kl(log_p, log_q)[:, None])


def jsd_grad(z: Tensor, y: Tensor, alpha: float) -> Tensor:
    """``dJSD / dz_v = (1 - alpha) p_v (log p_v - log m_v - KL(p‖m))``: m's own derivative cancels."""
    log_p, log_q = z.log_softmax(-1), y.log_softmax(-1)
    log_m = log_mixture(log_p, log_q, alpha)
    return (1 - alpha) * log_p.exp() * (log_p - log_m - reverse_kl(log_p, log_m)[:, None])


def skew_forward_kl_grad(z: Tensor, y: Tensor, alpha: float) -> Tensor:
    """``dKL(q‖m) / dz_v = -(1 - alpha) p_v (q_v / m_v - Σ_w p_w q_w / m_w)``, ``m = (1 - alpha) p + alpha q``."""
    log_p, log_q = z.log_softmax(-1), y.log_softmax(-1)
    ratio = (log_q - log_mixture(log_p, log_q, alpha)).exp()
    return -(1 - alpha) * centered(log_p.exp(), ratio)


def skew_reverse_kl_grad(z: Tensor, y: Tensor, alpha: float) -> Tensor:
    """``dKL(p‖m) / dz_v = p_v (r_v - Σ_w p_w r_w)``.

    ``r = log (p / m) - alpha p / m``, ``m = (1 - alpha) q + alpha p``.
    """
    log_p, log_q = z.log_softmax(-1), y.log_softmax(-1)
    log_ratio = log_p - log_mixture(log_q, log_p, alpha)
    return centered(log_p.exp(), log_ratio - alpha * log_ratio.exp())


def centered(p: Tensor, r: Tensor) -> Tensor:
    """``p_v (r_v - Σ_w p_w r_w)``: a derivative by probabilities, by logits."""
    return p * (r - (p * r).sum(-1, keepdim=True))


def log_ratio_grad(unclamped: Tensor, clamp: float | None) -> Tensor:
    """``d clamp(logp - old) / dlogp``: 1 inside ±clamp, 0 outside."""
    bound = LARGEST_LOG_RATIO if clamp is None else min(clamp, LARGEST_LOG_RATIO)
    return (unclamped.abs() <= bound).to(unclamped)


def clipped_loss_grad(
    ratio: Tensor,
    advantages: Tensor,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """``d grpo / d log rho = -rho A`` where no clip binds, else 0.

    For A > 0 the loss follows rho below ``min(1 + eps_high, delta)``; for A < 0 from ``1 - eps_low`` up to
    ``max(1 + eps_high, delta)``, or to ``dual_clip`` if that comes first.
    """
    ceiling = math.inf if delta is None else delta
    upper = min(max(1 + epsilon_high, ceiling), math.inf if dual_clip is None else dual_clip)
    rises = (advantages > 0) & (ratio < min(1 + epsilon_high, ceiling))
    falls = (advantages < 0) & (ratio > 1 - epsilon_low) & (ratio < upper)
    return torch.where(rises | falls, -ratio * advantages, 0.0)


def sequence_mean_grad(ratio_grad: Tensor, sequence_ids: Tensor) -> Tensor:
    """gspo: d/d a token's log-ratio is the mean of d/d log rho over the tokens of its sequence."""
    return sequence_mean(ratio_grad, sequence_ids)


def cispo_loss_grad(ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float) -> Tensor:
    """``d cispo / dlogp = -clip(rho, 1 - eps_low, 1 + eps_high) A``: a clipped token still learns."""
    return -ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * advantages


def sapo_loss_grad(ratio: Tensor, advantages: Tensor) -> Tensor:
    """``d sapo / d log rho = -4 A rho s (1 - s)``, ``s = sigmoid(tau (rho - 1))``: -A at rho = 1."""
    gate = torch.sigmoid(sapo_temperature(advantages) * (ratio - 1))
    return -4 * advantages * ratio * gate * (1 - gate)


def reinforce_loss_grad(advantages: Tensor) -> Tensor:
    """``d reinforce / dlogp = -A``."""
    return -advantages


def kl_estimate_grad(log_probs: Tensor, ref_log_probs: Tensor, kl_type: str, clamp: float | None = None) -> Tensor:
    """``d KL(ref) / dlogp``: k1 ``1``, k2 ``logp - ref``, k3 ``1 - exp(ref - logp)`` inside of the clamp, 0 outside."""
    difference = log_probs - ref_log_probs
    if kl_type == "k1":
        return torch.ones_like(difference)
    if kl_type == "k2":
        return difference
    if kl_type == "k3":
        return -torch.expm1(-log_ratio(log_probs, ref_log_probs, clamp)) * log_ratio_grad(difference, clamp)
    raise ValueError(f"kl_type: unknown, {kl_type!r}")
