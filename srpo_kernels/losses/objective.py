"""The SRPO objective on vectors of rows, in plain torch: the readable heart of the library.

Every function takes ``[n]`` statistics of n rows and returns ``[n]`` losses; autograd through them gives the
coefficients that the row passes spread over the vocabulary. Source: SRPO (arXiv 2604.02288), sections 3.1 to 3.3.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from srpo_kernels.checks import refuse_name
from srpo_kernels.distributed import sum_ranks
from srpo_kernels.losses.config import KLType, SRPOConfig

_IS_LOG_RATIO_CLAMP = 20.0
# The exponential of a larger log-ratio, times an advantage and a weight, could leave fp32: its gradient would be NaN.
_LARGEST_LOG_RATIO = 80.0
_SAPO_TAU_POSITIVE = 1.0
_SAPO_TAU_NEGATIVE = 1.05


METRICS = (
    "policy_loss_sum",
    "policy_tokens",
    "sdpo_loss_sum",
    "sdpo_tokens",
    "active_rows",
    "scored_policy_tokens",
    "clip_low_count",
    "clip_high_count",
    "dual_clip_count",
    "ref_kl_sum",
    "approx_kl_sum",
    "entropy_sum",
    "entropy_tokens",
    "teacher_entropy_sum",
    "dw_weight_sum",
    "dw_weight_sq_sum",
    "divergence_sum",
    "nonfinite_rows",
)


class RowInputs(NamedTuple):
    """What the caller says of each row: ``[n]`` each, None where not given. None carries gradient.

    ``sequences`` numbers the sequence of each row, from 0 to ``num_sequences - 1``; ``group`` has the ranks with other
    rows of the same sequences, None where there are none.
    """

    advantages: Tensor
    old_log_probs: Tensor | None
    ref_log_probs: Tensor | None
    is_weights: Tensor | None
    sequences: Tensor | None
    num_sequences: int
    group: ProcessGroup | None = None

    def select(self, rows: Tensor) -> RowInputs:
        """The inputs of some rows."""
        return RowInputs._make(x[rows] if isinstance(x, Tensor) else x for x in self)


class PolicyTerms(NamedTuple):
    """The policy branch of n rows: the loss (differentiable) and what a log wants to know, ``[n]`` each."""

    loss: Tensor
    clip_low: Tensor
    clip_high: Tensor
    dual_clip: Tensor
    approx_kl: Tensor
    ref_kl: Tensor


def policy_terms(log_probs: Tensor, entropy: Tensor | None, inputs: RowInputs, config: SRPOConfig) -> PolicyTerms:
    """Token losses of the policy branch, ``[n]``: clipped ratio, times is_weights, plus KL, minus entropy.

    Differentiable in ``log_probs`` and ``entropy`` (``[n]``; None when ``entropy_coef`` is 0).
    """
    advantages = inputs.advantages
    old_log_probs = log_probs.detach() if inputs.old_log_probs is None else inputs.old_log_probs
    log_ratio = _bounded(log_probs - old_log_probs, config)
    approx_kl = torch.expm1(log_ratio.detach()) - log_ratio.detach()
    if config.loss_type == "gspo":
        log_ratio = _sequence_mean(log_ratio, inputs)
    ratio = log_ratio.exp()

    loss, dual_clip = _policy_loss(log_probs, ratio, advantages, config)
    low, high = ratio < 1.0 - config.epsilon_low, ratio > 1.0 + config.epsilon_high
    if config.loss_type in ("grpo", "gspo"):
        clip_low, clip_high = low & (advantages < 0), high & (advantages > 0)
    elif config.loss_type == "cispo":
        clip_low, clip_high = low & (advantages != 0), high & (advantages != 0)
    else:
        clip_low = clip_high = torch.zeros_like(low)

    if inputs.is_weights is not None:
        loss = loss * inputs.is_weights
    ref_kl = torch.zeros_like(log_probs)
    if inputs.ref_log_probs is not None:
        ref_kl = _ref_kl(log_probs, inputs.ref_log_probs, config)
        if config.kl_coef != 0.0:
            loss = loss + config.kl_coef * ref_kl
    if entropy is not None:
        loss = loss - config.entropy_coef * entropy
    return PolicyTerms(loss, clip_low, clip_high, dual_clip, approx_kl, ref_kl.detach())


def _bounded(log_ratio: Tensor, config: SRPOConfig) -> Tensor:
    """What may enter an exponential; the gradient is 0 beyond the bound."""
    bound = _LARGEST_LOG_RATIO
    if config.log_ratio_clamp is not None:
        bound = min(bound, config.log_ratio_clamp)
    return log_ratio.clamp(-bound, bound)


def _policy_loss(log_probs: Tensor, ratio: Tensor, advantages: Tensor, config: SRPOConfig) -> tuple[Tensor, Tensor]:
    """The loss of ``config.loss_type`` per row, and where the dual clip holds it."""
    clipped = ratio.clamp(1.0 - config.epsilon_low, 1.0 + config.epsilon_high)
    nowhere = torch.zeros_like(ratio, dtype=torch.bool)
    match config.loss_type:
        case "grpo" | "gspo":
            bounded = ratio if config.delta is None else ratio.clamp(max=config.delta)
            loss = -torch.minimum(bounded * advantages, clipped * advantages)
            if config.dual_clip is None:
                return loss, nowhere
            ceiling = -config.dual_clip * advantages
            dual_clip = (advantages < 0) & (ceiling < loss)
            return torch.where(dual_clip, ceiling, loss), dual_clip
        case "cispo":
            return -clipped.detach() * advantages * log_probs, nowhere
        case "sapo":
            tau = torch.full_like(ratio, _SAPO_TAU_NEGATIVE).masked_fill(advantages > 0, _SAPO_TAU_POSITIVE)
            return -advantages * torch.sigmoid(tau * (ratio - 1.0)) * 4.0 / tau, nowhere
        case "reinforce":
            return -advantages * log_probs, nowhere
        case unknown:
            refuse_name("loss_type", unknown)


def _sequence_mean(values: Tensor, inputs: RowInputs) -> Tensor:
    """Each row's value replaced by the mean over the rows of its sequence, those of other ranks among them."""
    assert inputs.sequences is not None
    both = torch.stack([values, torch.ones_like(values)])
    sums = both.new_zeros(2, inputs.num_sequences).index_add(1, inputs.sequences, both)
    totals, counts = sum_ranks(sums, inputs.group).unbind()
    return (totals / counts.clamp_min(1.0))[inputs.sequences]


def _ref_kl(log_probs: Tensor, ref_log_probs: Tensor, config: SRPOConfig) -> Tensor:
    """Estimates of KL(policy || reference) from one sample: k1, k2, and k3 of a bounded log-ratio."""
    kl_type: KLType = config.kl_type
    difference = ref_log_probs - log_probs
    match kl_type:
        case "k1":
            return -difference
        case "k2":
            return 0.5 * difference.square()
        case "k3":
            difference = _bounded(difference, config)
            return torch.expm1(difference) - difference
        case unknown:
            refuse_name("kl_type", unknown)


def distillation_weights(log_probs: Tensor, inputs: RowInputs, config: SRPOConfig) -> Tensor:
    """``kappa * is_weights``, detached, ``[n]``: the correction for distilling tokens of an older policy."""
    weights = torch.ones_like(log_probs)
    if inputs.old_log_probs is not None and config.distillation_is_clip is not None:
        log_ratio = (log_probs.detach() - inputs.old_log_probs).clamp(-_IS_LOG_RATIO_CLAMP, _IS_LOG_RATIO_CLAMP)
        weights = log_ratio.exp().clamp(max=config.distillation_is_clip)
    return weights if inputs.is_weights is None else weights * inputs.is_weights


def support_divergence(
    log_p: Tensor, log_q: Tensor, log_p_tail: Tensor | None, log_q_tail: Tensor | None, config: SRPOConfig
) -> Tensor:
    """The configured divergence over K log-probs ``[n, K]`` and, with tails ``[n]``, one more bucket.

    Without tails both models are renormalised over the K. Differentiable in ``log_p`` and ``log_p_tail``.
    """
    if log_p_tail is not None and log_q_tail is not None:
        log_p = torch.cat([log_p, log_p_tail[:, None]], dim=1)
        log_q = torch.cat([log_q, log_q_tail[:, None]], dim=1)
    elif not config.add_tail:
        log_p, log_q = log_p.log_softmax(1), log_q.log_softmax(1)
    match config.divergence:
        case "forward_kl":
            return _kl(log_q, log_p)
        case "reverse_kl":
            return _kl(log_p, log_q)
        case "jsd":
            log_m = torch.logaddexp(log_p + math.log1p(-config.alpha), log_q + math.log(config.alpha))
            return (1.0 - config.alpha) * _kl(log_p, log_m) + config.alpha * _kl(log_q, log_m)
        case unknown:
            refuse_name("divergence", unknown)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(1)


def sampled_divergence(log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """``sg(log p_t - log q_t) * log p_t``: the score-function surrogate of reverse KL at the sampled token, ``[n]``."""
    return (log_probs.detach() - teacher_log_probs) * log_probs


def entropy_log_weights(teacher_entropy: Tensor, dw_beta: float) -> Tensor:
    """Log of the unnormalised entropy-aware weight, ``-dw_beta * H_t`` ``[n]`` (section 3.2)."""
    return -dw_beta * teacher_entropy


def log_mean_exp(values: Tensor) -> Tensor:
    """Log of the mean of the exponentials of a non-empty vector."""
    return values.logsumexp(0) - math.log(len(values))
