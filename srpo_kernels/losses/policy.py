"""The policy losses, each once: token losses on ``[n]`` vectors, to be minimised.

``rho = exp(log_probs - old_log_probs)`` is the ratio, A the advantage. Source: SRPO (arXiv 2604.02288), section 3.1,
and the papers that are named.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from srpo_kernels.losses.registry import POLICY_LOSSES, PolicyRows, TokenLoss, register_policy_loss

__all__ = [
    "POLICY_LOSSES", "cispo", "clip_cov", "dppo_kl", "dppo_tv", "dro", "gmpo", "grpo", "gspo", "gspo_token", "ipo",
    "kl_cov", "luspo", "reinforce", "sapo", "vespo",
]  # fmt: skip

# The range of VESPO's log-ratio of a sequence.
_VESPO_LOG_RATIOS = (math.log(1e-8), 20.0)
# What DPPO adds to the probability of all other tokens, which fp32 rounds to 0 where one has nearly all of it.
_LEAST_REST = 1e-8


def grpo(
    rows: PolicyRows, *, epsilon_low: float, epsilon_high: float, delta: float | None, dual_clip: float | None
) -> TokenLoss:
    """``-min(min(rho, delta) A, clip(rho, 1 - epsilon_low, 1 + epsilon_high) A)``; at most ``-dual_clip A`` for A < 0.

    Source: DeepSeekMath (arXiv 2402.03300); two epsilons: arXiv 2503.14476; delta: 2505.07291; dual_clip: 1912.09729.
    Elsewhere: TRL (`grpo`, `dapo`, `bnpo`, `dr_grpo`), verl (`vanilla`), Tinker (`ppo`).
    """
    return _clipped(rows.log_ratio.exp(), rows.advantages, epsilon_low, epsilon_high, delta, dual_clip)


def gspo(
    rows: PolicyRows, *, epsilon_low: float, epsilon_high: float, delta: float | None, dual_clip: float | None
) -> TokenLoss:
    """``grpo`` with one rho per sequence, the exponential of its mean log-ratio.

    Source: GSPO (arXiv 2507.18071). Elsewhere: TRL (`importance_sampling_level="sequence"`).
    """
    ratio = rows.sequence_mean(rows.log_ratio).exp()
    return _clipped(ratio, rows.advantages, epsilon_low, epsilon_high, delta, dual_clip)


def luspo(
    rows: PolicyRows, *, epsilon_low: float, epsilon_high: float, delta: float | None, dual_clip: float | None
) -> TokenLoss:
    """``gspo`` times the length of the sequence, whose mean over tokens would favour short ones.

    For ``reduction="sequence"``. Source: LUSPO (arXiv 2602.05261). Elsewhere: TRL (`luspo`).
    """
    token = gspo(rows, epsilon_low=epsilon_low, epsilon_high=epsilon_high, delta=delta, dual_clip=dual_clip)
    return token._replace(loss=token.loss * rows.sequence_lengths())


def gspo_token(
    rows: PolicyRows, *, epsilon_low: float, epsilon_high: float, delta: float | None, dual_clip: float | None
) -> TokenLoss:
    """``gspo`` whose gradient reaches each token with its own advantage: ``rho = sg(rho_sequence) p / sg(p)``.

    Source: GSPO (arXiv 2507.18071), section 4.3. Elsewhere: verl (`gspo`).
    """
    own = rows.log_probs - rows.log_probs.detach()
    ratio = (rows.sequence_mean(rows.log_ratio).detach() + own).exp()
    return _clipped(ratio, rows.advantages, epsilon_low, epsilon_high, delta, dual_clip)


def gmpo(rows: PolicyRows, *, epsilon_low: float, epsilon_high: float) -> TokenLoss:
    """``-A rho``, one rho per sequence: the geometric mean of ratios whose logarithm is clipped token by token.

    ``log rho`` stays above ``-epsilon_low`` where A < 0 and below ``epsilon_high`` where A > 0; 0.4 in the paper.
    Source: GMPO (arXiv 2507.20673). Elsewhere: verl (`geo_mean`), TRL (experimental `gmpo`).
    """
    low = (rows.log_ratio < -epsilon_low) & (rows.advantages < 0)
    high = (rows.log_ratio > epsilon_high) & (rows.advantages > 0)
    clipped = torch.where(low | high, rows.log_ratio.clamp(-epsilon_low, epsilon_high), rows.log_ratio)
    return TokenLoss(-rows.advantages * rows.sequence_mean(clipped).exp(), low, high)


def vespo(
    rows: PolicyRows, *, k_positive: float = 2.0, lambda_positive: float = 3.0, k_negative: float = 3.0,
    lambda_negative: float = 2.0,
) -> Tensor:  # fmt: skip
    """``-sg(phi(w)) A log_probs``, ``phi(w) = exp(lambda (1 - w)) w**k``, w the product of the sequence's ratios.

    k and lambda are the negative ones where A < 0; log w is in [log 1e-8, 20]. Source: VESPO (arXiv 2602.10693).
    Elsewhere: TRL (`vespo`).
    """
    log_w = rows.sequence_sum(rows.log_ratio.detach()).clamp(*_VESPO_LOG_RATIOS)
    negative = rows.advantages < 0
    k = torch.full_like(log_w, k_positive).masked_fill(negative, k_negative)
    scale = torch.full_like(log_w, lambda_positive).masked_fill(negative, lambda_negative)
    return -torch.exp(k * log_w - scale * torch.expm1(log_w)) * rows.advantages * rows.log_probs


def cispo(rows: PolicyRows, *, epsilon_low: float, epsilon_high: float) -> TokenLoss:
    """``-sg(clip(rho, 1 - epsilon_low, 1 + epsilon_high)) A log_probs``.

    Source: MiniMax-M1 (arXiv 2506.13585). Elsewhere: TRL (`cispo`, without the lower bound), verl (`cispo`), Tinker.
    """
    ratio = rows.log_ratio.detach().exp()
    low, high = ratio < 1.0 - epsilon_low, ratio > 1.0 + epsilon_high
    loss = -ratio.clamp(1.0 - epsilon_low, 1.0 + epsilon_high) * rows.advantages * rows.log_probs
    moves = rows.advantages != 0
    return TokenLoss(loss, low & moves, high & moves)


def sapo(rows: PolicyRows, *, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Tensor:
    """``-A sigmoid(tau (rho - 1)) 4 / tau``, tau by the sign of A.

    Source: SAPO (arXiv 2511.20347). Elsewhere: TRL (`sapo`), verl (`sapo`).
    """
    tau = torch.full_like(rows.log_ratio, tau_negative).masked_fill(rows.advantages > 0, tau_positive)
    return -rows.advantages * torch.sigmoid(tau * (rows.log_ratio.exp() - 1.0)) * 4.0 / tau


def reinforce(rows: PolicyRows) -> Tensor:
    """``-A log_probs``.

    Source: Williams (1992). Elsewhere: verl (`gpg`).
    """
    return -rows.advantages * rows.log_probs


def dppo_tv(rows: PolicyRows, *, epsilon_low: float, epsilon_high: float, ratio_max: float = 20.0) -> TokenLoss:
    """``-sg(min(rho, ratio_max)) A log_probs``, 0 where the token's probability has moved too far already.

    That is more than ``epsilon_high`` up where A > 0, more than ``epsilon_low`` down where A < 0: total variation
    between the token and all others. Source: DPPO (arXiv 2602.04879), Binary-TV. Elsewhere: verl (`dppo_tv`), prime-rl
    (its default, with a penalty).
    """
    moved = rows.log_probs.detach().exp() - rows.old_log_probs.exp()
    return _in_trust_region(rows, moved < -epsilon_low, moved > epsilon_high, ratio_max)


def dppo_kl(rows: PolicyRows, *, epsilon_low: float, epsilon_high: float, ratio_max: float = 20.0) -> TokenLoss:
    """``dppo_tv`` with ``KL(old || current)`` between the token and all others in place of the total variation.

    Source: DPPO (arXiv 2602.04879), Binary-KL. Elsewhere: verl (`dppo_kl`).
    """
    new, old = rows.log_probs.detach(), rows.old_log_probs
    other_new, other_old = (-torch.expm1(x.clamp_max(0.0)) for x in (new, old))
    tiny = _LEAST_REST
    kl = old.exp() * (old - new) + other_old * ((other_old + tiny) / (other_new + tiny)).log()
    return _in_trust_region(rows, (kl > epsilon_low) & (new < old), (kl > epsilon_high) & (new > old), ratio_max)


def ipo(rows: PolicyRows, *, threshold: float = 0.1, penalty: float = 1e-3) -> TokenLoss:
    """``-rho A`` where the token's probability has moved by ``threshold`` at most, ``+ penalty (log rho)**2``.

    Source: prime-rl. Elsewhere: prime-rl (`ipo`).
    """
    moved = rows.log_probs.detach().exp() - rows.old_log_probs.exp()
    low, high = moved < -threshold, moved > threshold
    gain = (rows.log_ratio.exp() * rows.advantages).masked_fill(low | high, 0.0)
    weighs = rows.advantages != 0
    return TokenLoss(penalty * rows.log_ratio.square() - gain, low & weighs, high & weighs)


def dro(rows: PolicyRows, *, beta: float = 0.1) -> Tensor:
    """``-A log_probs + beta / 2 (log rho)**2``.

    Source: Direct Reward Optimization (arXiv 2405.19107), per token. Elsewhere: verl (`dro`), Tinker (`dro`).
    """
    return 0.5 * beta * rows.log_ratio.square() - rows.advantages * rows.log_probs


def clip_cov(
    rows: PolicyRows, *, epsilon_low: float, epsilon_high: float, share: float = 2e-4, cov_low: float = 1.0,
    cov_high: float = 5.0,
) -> TokenLoss:  # fmt: skip
    """``grpo``, 0 at a ``share`` of all tokens (one at least), whose covariance is in (``cov_low``, ``cov_high``).

    A token's covariance is ``(A - mean A) (log_probs - mean log_probs)``, means over the rows of the call. The tokens
    of the band that no ratio clips are sorted by it, and taken at equal distances; the paper draws them at random.
    Source: Clip-Cov (arXiv 2505.22617). Elsewhere: verl (`clip_cov`).
    """
    token = _clipped(rows.log_ratio.exp(), rows.advantages, epsilon_low, epsilon_high, None, None)
    covariance = _covariance(rows)
    held = torch.zeros_like(token.loss, dtype=torch.bool) if token.clip_low is None else token.clip_low
    held = held if token.clip_high is None else held | token.clip_high
    inside = (covariance > cov_low) & (covariance < cov_high) & ~held
    order = covariance.masked_fill(~inside, -torch.inf).argsort(descending=True, stable=True)
    rank = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    # Of m tokens in the band, k at equal distances in their order.
    m, k = inside.sum().clamp_min(1), max(int(share * len(order)), 1)
    dropped = inside & ((rank + 1) * k // m > rank * k // m)
    return token._replace(loss=token.loss.masked_fill(dropped, 0.0))


def kl_cov(rows: PolicyRows, *, share: float = 2e-4, coefficient: float = 1.0) -> Tensor:
    """``-rho A``, ``+ coefficient |log rho|`` at the ``share`` of all tokens (one at least) of largest covariance.

    Of equal ones the first is taken. The covariance is ``clip_cov``'s. Source: KL-Cov (arXiv 2505.22617). Elsewhere:
    verl (`kl_cov`).
    """
    covariance = _covariance(rows)
    chosen = covariance.argsort(descending=True, stable=True)[: max(int(share * len(covariance)), 1)]
    penalty = torch.zeros_like(covariance).index_fill(0, chosen, coefficient)
    return penalty * rows.log_ratio.abs() - rows.log_ratio.exp() * rows.advantages


def _covariance(rows: PolicyRows) -> Tensor:
    """Each token's share of the covariance of advantage and log-prob over all rows."""
    log_probs = rows.log_probs.detach()
    return (rows.advantages - rows.advantages.mean()) * (log_probs - log_probs.mean())


def _in_trust_region(rows: PolicyRows, below: Tensor, above: Tensor, ratio_max: float) -> TokenLoss:
    """``-sg(min(rho, ratio_max)) A log_probs`` but where A < 0 and ``below``, or A > 0 and ``above``."""
    low, high = below & (rows.advantages < 0), above & (rows.advantages > 0)
    ratio = rows.log_ratio.detach().exp().clamp(max=ratio_max)
    return TokenLoss(-(ratio * rows.advantages * rows.log_probs).masked_fill(low | high, 0.0), low, high)


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


_POSITIVE = ("> 0", lambda value: value > 0)
_NON_NEGATIVE = (">= 0", lambda value: value >= 0)
_SHARE = ("in (0, 1]", lambda value: 0 < value <= 1)

register_policy_loss("grpo", grpo, zero_without_advantage=True)
register_policy_loss("cispo", cispo, zero_without_advantage=True)
register_policy_loss("gspo", gspo, whole_sequences=True, zero_without_advantage=True)
register_policy_loss("gspo_token", gspo_token, whole_sequences=True, zero_without_advantage=True)
register_policy_loss("luspo", luspo, whole_sequences=True, zero_without_advantage=True)
register_policy_loss("gmpo", gmpo, whole_sequences=True, zero_without_advantage=True)
register_policy_loss(
    "vespo",
    vespo,
    ranges=dict.fromkeys(("k_positive", "lambda_positive", "k_negative", "lambda_negative"), _POSITIVE),
    whole_sequences=True,
    zero_without_advantage=True,
)
register_policy_loss(
    "sapo", sapo, ranges={"tau_positive": _POSITIVE, "tau_negative": _POSITIVE}, zero_without_advantage=True
)
register_policy_loss("reinforce", reinforce, zero_without_advantage=True)
register_policy_loss("dppo_tv", dppo_tv, ranges={"ratio_max": _POSITIVE}, zero_without_advantage=True)
register_policy_loss("dppo_kl", dppo_kl, ranges={"ratio_max": _POSITIVE}, zero_without_advantage=True)
register_policy_loss("ipo", ipo, ranges={"threshold": _NON_NEGATIVE, "penalty": _NON_NEGATIVE})
register_policy_loss("dro", dro, ranges={"beta": _NON_NEGATIVE})
register_policy_loss("clip_cov", clip_cov, ranges={"share": _SHARE}, whole_batch=True)
register_policy_loss("kl_cov", kl_cov, ranges={"share": _SHARE, "coefficient": _NON_NEGATIVE}, whole_batch=True)
