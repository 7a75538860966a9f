"""What a row's loss is made of in either branch, before any reduction."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from srpo_kernels.losses.config import SRPOConfig
from srpo_kernels.losses.log_ratio import clipped_is_weights, ref_kl
from srpo_kernels.losses.registry import PolicyRows, policy_loss_of
from srpo_kernels.losses.sequences import Sequences


class PolicyTerms(NamedTuple):
    """The policy branch of n rows: the loss (differentiable) and what a log wants to know, ``[n]`` each."""

    loss: Tensor
    clip_low: Tensor
    clip_high: Tensor
    dual_clip: Tensor
    approx_kl: Tensor
    ref_kl: Tensor


def policy_terms(
    log_probs: Tensor,
    advantages: Tensor,
    config: SRPOConfig,
    *,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    is_weights: Tensor | None = None,
    entropy: Tensor | None = None,
    sequences: Sequences | None = None,
) -> PolicyTerms:
    """Token losses of the policy branch: the policy loss, times is_weights, plus KL, minus entropy.

    All are ``[n]``. Differentiable in ``log_probs`` and ``entropy`` (None when ``entropy_coef`` is 0).
    """
    rows = PolicyRows.of(log_probs, old_log_probs, advantages, sequences, config.log_ratio_clamp)
    log_ratio = rows.log_ratio.detach()
    approx_kl = torch.expm1(log_ratio) - log_ratio
    loss, *clips = policy_loss_of(config.loss_type)(rows, config.policy_options())
    nowhere = torch.zeros_like(log_ratio, dtype=torch.bool)
    clip_low, clip_high, dual_clip = (nowhere if clip is None else clip for clip in clips)
    if is_weights is not None:
        loss = loss * is_weights
    kl = torch.zeros_like(approx_kl)
    if ref_log_probs is not None:
        kl = ref_kl(log_probs, ref_log_probs, rows.log_ratio, config.kl_type, config.log_ratio_clamp)
        if config.kl_coef != 0.0:
            loss = loss + config.kl_coef * kl
    if entropy is not None:
        loss = loss - config.entropy_coef * entropy
    return PolicyTerms(loss, clip_low, clip_high, dual_clip, approx_kl, kl.detach())


def distillation_weights(
    log_probs: Tensor, old_log_probs: Tensor | None, is_weights: Tensor | None, config: SRPOConfig
) -> Tensor:
    """``kappa * is_weights``, detached, ``[n]``: the corrections of a divergence, but for the entropy's."""
    kappa = clipped_is_weights(log_probs, old_log_probs, config.distillation_is_clip)
    return kappa if is_weights is None else kappa * is_weights
