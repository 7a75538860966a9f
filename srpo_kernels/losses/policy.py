"""The policy losses, each once: token losses on ``[n]`` vectors, to be minimised.

``rho = exp(log_probs - old_log_probs)`` is the ratio, A the advantage. Source: SRPO (arXiv 2604.02288), section 3.1,
and the papers that are named.
"""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_kernels.losses.registry import POLICY_LOSSES, PolicyRows, TokenLoss, register_policy_loss

__all__ = ["POLICY_LOSSES", "cispo", "grpo", "gspo", "luspo", "reinforce", "sapo"]


def grpo(
    rows: PolicyRows, *, epsilon_low: float, epsilon_high: float, delta: float | None, dual_clip: float | None
) -> TokenLoss:
    """``-min(min(rho, delta) A, clip(rho, 1 - epsilon_low, 1 + epsilon_high) A)``; at most ``-dual_clip A`` for A < 0.

    Source: DeepSeekMath (arXiv 2402.03300); two epsilons: arXiv 2503.14476; delta: 2505.07291; dual_clip: 1912.09729.
    """
    return _clipped(rows.log_ratio.exp(), rows.advantages, epsilon_low, epsilon_high, delta, dual_clip)


def gspo(
    rows: PolicyRows, *, epsilon_low: float, epsilon_high: float, delta: float | None, dual_clip: float | None
) -> TokenLoss:
    """``grpo`` with one rho per sequence, the exponential of its mean log-ratio. Source: arXiv 2507.18071."""
    ratio = rows.sequence_mean(rows.log_ratio).exp()
    return _clipped(ratio, rows.advantages, epsilon_low, epsilon_high, delta, dual_clip)


def luspo(
    rows: PolicyRows, *, epsilon_low: float, epsilon_high: float, delta: float | None, dual_clip: float | None
) -> TokenLoss:
    """``gspo`` times the length of the sequence, whose mean over tokens would favour short ones.

    Source: LUSPO (arXiv 2602.05261), for ``reduction="sequence"``.
    """
    token = gspo(rows, epsilon_low=epsilon_low, epsilon_high=epsilon_high, delta=delta, dual_clip=dual_clip)
    return token._replace(loss=token.loss * rows.sequence_lengths())


def cispo(rows: PolicyRows, *, epsilon_low: float, epsilon_high: float) -> TokenLoss:
    """``-sg(clip(rho, 1 - epsilon_low, 1 + epsilon_high)) A log_probs``. Source: MiniMax-M1 (arXiv 2506.13585)."""
    ratio = rows.log_ratio.detach().exp()
    low, high = ratio < 1.0 - epsilon_low, ratio > 1.0 + epsilon_high
    loss = -ratio.clamp(1.0 - epsilon_low, 1.0 + epsilon_high) * rows.advantages * rows.log_probs
    moves = rows.advantages != 0
    return TokenLoss(loss, low & moves, high & moves)


def sapo(rows: PolicyRows, *, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Tensor:
    """``-A sigmoid(tau (rho - 1)) 4 / tau``, tau by the sign of A. Source: SAPO (arXiv 2511.20347)."""
    tau = torch.full_like(rows.log_ratio, tau_negative).masked_fill(rows.advantages > 0, tau_positive)
    return -rows.advantages * torch.sigmoid(tau * (rows.log_ratio.exp() - 1.0)) * 4.0 / tau


def reinforce(rows: PolicyRows) -> Tensor:
    """``-A log_probs``."""
    return -rows.advantages * rows.log_probs


def _clipped(
    ratio: Tensor,
    advantages: Tensor,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None,
    dual_clip: float | None,
) -> TokenLoss:
    low, high = ratio < 1.0 - epsilon_low, ratio > 1.0 + epsilon_high
    clipped = ratio.clamp(1.0 - epsilon_low, 1.0 + epsilon_high)
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    loss = -torch.minimum(bounded * advantages, clipped * advantages)
    held = None
    if dual_clip is not None:
        ceiling = -dual_clip * advantages
        held = (advantages < 0) & (ceiling < loss)
        loss = torch.where(held, ceiling, loss)
    return TokenLoss(loss, low & (advantages < 0), high & (advantages > 0), held)


_TAU = ("> 0", lambda tau: tau > 0)

register_policy_loss("grpo", grpo, zero_without_advantage=True)
register_policy_loss("cispo", cispo, zero_without_advantage=True)
register_policy_loss("gspo", gspo, whole_sequences=True, zero_without_advantage=True)
register_policy_loss("luspo", luspo, whole_sequences=True, zero_without_advantage=True)
register_policy_loss("sapo", sapo, ranges={"tau_positive": _TAU, "tau_negative": _TAU}, zero_without_advantage=True)
register_policy_loss("reinforce", reinforce, zero_without_advantage=True)
