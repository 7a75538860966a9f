"""The distillation branch: student against stop-gradient teacher. Paper 3.2."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .logits import LOWEST, select_log_probs


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


def entries(log_p: Tensor, log_q: Tensor, kind: str, alpha: Tensor) -> Tensor:
    """Each token's share of a divergence, ``[n, V]``: a sum over one token is its share. ``alpha`` is ``[n]``.

    A jsd with alpha 0 is forward_kl here, one with alpha 1 reverse_kl.
    """
    log_p, log_q, shares = log_p[..., None], log_q[..., None], torch.empty_like(log_p)
    for a in alpha.unique():
        name = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(a.item(), kind) if kind == "jsd" else kind
        rows = alpha == a
        shares = torch.where(rows[:, None], divergence(log_p, log_q, name, a.item()), shares)
    return shares


def configured_divergence(
    log_p: Tensor, log_q: Tensor, config: Any, alpha: Tensor | None, clip: Tensor | None
) -> Tensor:
    """``Σ_v min(f_v, clip)``, f the config's divergence, with the rows' own ``alpha`` and ``clip`` ``[n]`` if given.

    The clip is OPSD's (arXiv 2601.18734).
    """
    bound = getattr(config, "divergence_clip", None)
    if alpha is None and clip is None and bound is None:
        return divergence(log_p, log_q, config.divergence, config.alpha)
    constant = torch.ones(len(log_p), dtype=log_p.dtype, device=log_p.device)
    alpha = constant * config.alpha if alpha is None else alpha
    clip = constant * (math.inf if bound is None else bound) if clip is None else clip
    shares = entries(log_p, log_q, config.divergence, alpha)
    return torch.where(shares < clip[:, None], shares, clip[:, None]).sum(-1)


def top_k_buckets(
    student_logits: Tensor, teacher_logits: Tensor, k: int, add_tail: bool, of: str = "student"
) -> tuple[Tensor, Tensor]:
    """Both models over the top ``k`` tokens of one of them: ``[n, V]`` logits to ``[n, k]`` or ``[n, k + 1]``.

    The true log-probs at those tokens and, with ``add_tail``, the log of the complement's mass, an exact
    logsumexp over the other tokens. Without a tail both are renormalised over the k tokens.
    """
    if of not in ("student", "teacher"):
        raise ValueError(f"topk_of: unknown, {of!r}")
    chooser = student_logits if of == "student" else teacher_logits
    ids = chooser.topk(min(k, chooser.shape[-1]), dim=-1).indices
    return buckets(student_logits, ids, add_tail), buckets(teacher_logits, ids, add_tail)


def buckets(logits: Tensor, ids: Tensor, add_tail: bool) -> Tensor:
    """The log-probs at distinct ``ids`` ``[n, k]`` and of all others; a negative id is none, with probability 0."""
    there, vocabulary = ids >= 0, logits.shape[-1]
    log_probs = torch.where(there, select_log_probs(logits, ids.clamp(min=0)), LOWEST)
    if not add_tail:
        return log_probs.log_softmax(-1)
    if ids.shape[-1] == vocabulary:
        return log_probs
    chosen = torch.zeros(len(ids), vocabulary + 1, dtype=torch.bool, device=ids.device)
    chosen = chosen.scatter(1, torch.where(there, ids, vocabulary), True)[:, :vocabulary]
    tail = logits.log_softmax(-1).masked_fill(chosen, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs, tail], dim=-1)


def given_buckets(log_probs: Tensor, ids: Tensor, add_tail: bool, vocabulary: int) -> Tensor:
    """The same of a teacher of which no more than the log-probs at ``ids`` is known."""
    log_probs = torch.where(ids >= 0, log_probs, LOWEST).clamp(min=LOWEST)
    if not add_tail:
        return log_probs.log_softmax(-1)
    if ids.shape[-1] == vocabulary:
        return log_probs
    rest = 1 - log_probs.exp().sum(-1, keepdim=True)
    return torch.cat([log_probs, rest.clamp(min=torch.finfo(rest.dtype).tiny).log()], dim=-1)


def bucket_entropy(log_probs: Tensor, ids: Tensor) -> Tensor:
    """``-Σ_k q_k log q_k - r log r``, ``r = 1 - Σ_k q_k``: a lower bound of the entropy of the row."""
    q = torch.where(ids >= 0, log_probs, LOWEST).clamp(min=LOWEST).exp()
    rest = (1 - q.sum(-1, keepdim=True)).clamp(min=0)
    buckets = torch.cat([q, rest], dim=-1)
    return -torch.xlogy(buckets, buckets).sum(-1).clamp(max=0)


def sampled_loss(log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """``sg(log p_t - log q_t) · log p_t`` at the sampled token: the score-function gradient of reverse KL."""
    return (log_probs - teacher_log_probs).detach() * log_probs


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target_ids: Tensor,
    config: Any,
    alpha: Tensor | None = None,
    clip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token loss and divergence of ``config.distillation_mode``, both ``[n]``; only ``sampled`` differs.

    ``alpha`` and ``clip`` ``[n]`` are the rows' own.
    """
    if config.distillation_mode == "sampled":
        log_p = select_log_probs(student_logits, target_ids[:, None])[:, 0]
        log_q = select_log_probs(teacher_logits, target_ids[:, None])[:, 0]
        return sampled_loss(log_p, log_q), log_p - log_q
    if config.distillation_mode == "topk":
        of = getattr(config, "topk_of", "student")
        log_p, log_q = top_k_buckets(student_logits, teacher_logits, config.topk, config.add_tail, of)
    elif config.distillation_mode == "full":
        log_p, log_q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    else:
        raise ValueError(f"distillation_mode: unknown, {config.distillation_mode!r}")
    value = configured_divergence(log_p, log_q, config, alpha, clip)
    return value, value


def given_distillation_loss(
    student_logits: Tensor,
    ids: Tensor,
    teacher_log_probs: Tensor,
    config: Any,
    alpha: Tensor | None = None,
    clip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same of ``topk`` where the teacher's log-probs at its likeliest tokens are all that is known of it."""
    log_p = buckets(student_logits, ids, config.add_tail)
    log_q = given_buckets(teacher_log_probs, ids, config.add_tail, student_logits.shape[-1])
    value = configured_divergence(log_p, log_q, config, alpha, clip)
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
