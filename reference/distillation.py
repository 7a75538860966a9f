"""The distillation branch: student against stop-gradient teacher. Paper 3.2."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .logits import select_log_probs


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(p‖q) = Σ_v p_v (log p_v - log q_v)``: ``[n, V]`` log-probabilities to ``[n]``."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(q‖p)``."""
    return reverse_kl(log_q, log_p)


def log_mixture(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """``log m``, ``m = (1 - alpha) p + alpha q``, by logaddexp: finite where p or q underflow."""
    return torch.logaddexp(log_p + math.log1p(-alpha), log_q + math.log(alpha))


def jsd(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """``(1 - alpha) KL(p‖m) + alpha KL(q‖m)``."""
    log_m = log_mixture(log_p, log_q, alpha)
    return (1 - alpha) * reverse_kl(log_p, log_m) + alpha * reverse_kl(log_q, log_m)


def skew_forward_kl(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """``KL(q‖m)``, ``m = (1 - alpha) p + alpha q``. DistiLLM (arXiv 2402.03898) 3.1."""
    return reverse_kl(log_q, log_mixture(log_p, log_q, alpha))


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """``KL(p‖m)``, ``m = (1 - alpha) q + alpha p``: alpha is the student's share here. DistiLLM 3.1."""
    return reverse_kl(log_p, log_mixture(log_q, log_p, alpha))


def divergence(log_p: Tensor, log_q: Tensor, kind: str, alpha: float = 0.5) -> Tensor:
    """The divergence named ``kind`` between two rows of normalised log-probabilities."""
    if kind == "forward_kl":
        return forward_kl(log_p, log_q)
    if kind == "reverse_kl":
        return reverse_kl(log_p, log_q)
    if kind == "jsd":
        return jsd(log_p, log_q, alpha)
    if kind == "skew_forward_kl":
        return skew_forward_kl(log_p, log_q, alpha)
    if kind == "skew_reverse_kl":
        return skew_reverse_kl(log_p, log_q, alpha)
    raise ValueError(f"divergence: unknown, {kind!r}")


def top_k_buckets(student_logits: Tensor, teacher_logits: Tensor, k: int, add_tail: bool) -> tuple[Tensor, Tensor]:
    """Both models over the student's top ``k`` tokens: ``[n, V]`` logits to ``[n, k]`` or ``[n, k + 1]``.

    The true log-probs at those tokens and, with ``add_tail``, the log of the complement's mass, an exact
    logsumexp over the other tokens. Without a tail both are renormalised over the k tokens.
    """
    vocabulary = student_logits.shape[-1]
    k = min(k, vocabulary)
    ids = student_logits.topk(k, dim=-1).indices

    def buckets(logits: Tensor) -> Tensor:
        log_probs = select_log_probs(logits, ids)
        if not add_tail:
            return log_probs.log_softmax(-1)
        if k == vocabulary:
            return log_probs
        tail = logits.log_softmax(-1).scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
        return torch.cat([log_probs, tail], dim=-1)

    return buckets(student_logits), buckets(teacher_logits)


def sampled_loss(log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """``sg(log p_t - log q_t) · log p_t`` at the sampled token: the score-function gradient of reverse KL."""
    return (log_probs - teacher_log_probs).detach() * log_probs


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, target_ids: Tensor, config: Any
) -> tuple[Tensor, Tensor]:
    """Token loss and divergence of ``config.distillation_mode``, both ``[n]``; only ``sampled`` differs."""
    if config.distillation_mode == "sampled":
        log_p = select_log_probs(student_logits, target_ids[:, None])[:, 0]
        log_q = select_log_probs(teacher_logits, target_ids[:, None])[:, 0]
        return sampled_loss(log_p, log_q), log_p - log_q
    if config.distillation_mode == "topk":
        log_p, log_q = top_k_buckets(student_logits, teacher_logits, config.topk, config.add_tail)
    elif config.distillation_mode == "full":
        log_p, log_q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    else:
        raise ValueError(f"distillation_mode: unknown, {config.distillation_mode!r}")
    value = divergence(log_p, log_q, config.divergence, config.alpha)
    return value, value


def importance_clip(log_probs: Tensor, old_log_probs: Tensor | None, clip: float | None) -> Tensor:
    """``kappa = sg(min(exp(clamp(logp - old_logp, ±20)), clip))``; 1 without old log-probs or clip."""
    if old_log_probs is None or clip is None:
        return torch.ones_like(log_probs)
    return (log_probs.detach() - old_log_probs).clamp(-20, 20).exp().clamp(max=clip)


def weight_log_mean(teacher_entropy: Tensor, dw_beta: float) -> Tensor:
    """``log mean exp(-dw_beta H_t)`` over every valid distillation token of a whole batch. Paper 3.2."""
    return torch.logsumexp(-dw_beta * teacher_entropy, dim=0) - math.log(max(len(teacher_entropy), 1))


def entropy_weights(teacher_entropy: Tensor, dw_beta: float, log_mean: Tensor | float) -> Tensor:
    """``w = exp(-dw_beta H_t - log_mean)``: trust confident teachers, 1 on average. Paper 3.2."""
    return torch.exp(-dw_beta * teacher_entropy - log_mean)
