"""Per-token statistics, differentiable: what any other loss can be made of."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import distillation
from .layout import per_row
from .logits import (
    Project,
    entropy,
    head_logits,
    project_wide,
    restricted,
    teacher_head,
    teacher_logits,
    token_log_probs,
)


class TokenStats(NamedTuple):
    """Per row, 0 where masked; the teacher's are None without one. ``teacher_entropy`` is detached."""

    log_probs: Tensor
    entropy: Tensor
    divergence: Tensor | None
    teacher_entropy: Tensor | None
    logsumexp: Tensor


class TeacherStats(NamedTuple):
    """Per row, 0 where masked, detached: ``H(q)`` and the logsumexp of the logits."""

    entropy: Tensor
    logsumexp: Tensor


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    mask: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_topk_ids: Tensor | None = None,
    teacher_topk_log_probs: Tensor | None = None,
    support_ids: Tensor | None = None,
    divergence: str = "jsd",
    alpha: float = 0.5,
    distillation_mode: str = "full",
    topk: int = 100,
    topk_of: str = "student",
    add_tail: bool = True,
    divergence_alpha: Tensor | None = None,
    divergence_clip: float | Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_transform: Any = None,
    project: Project = project_wide,
) -> TokenStats:
    """``log p_t``, ``H(p)``, ``D(p, q)``, ``H(q)``, ``log Σ_v exp(z_v)`` of every valid row, in its shape each.

    With ``support_ids`` all but what compares p with q is over these tokens and the row's own. ``divergence_alpha``,
    and ``divergence_clip`` as a tensor, are the rows' own.
    """
    valid = torch.ones_like(target_ids, dtype=torch.bool) if mask is None else mask
    logits_of = partial(head_logits, temperature=temperature, logit_scale=logit_scale, softcap=softcap, project=project)

    logits, ids = logits_of(hidden[valid], weight, bias), target_ids[valid]
    policy = logits if support_ids is None else restricted(logits, support_ids[valid], ids)
    log_probs, entropies = spread(token_log_probs(policy, ids), valid), spread(entropy(policy), valid)
    logsumexp = spread(policy.logsumexp(-1), valid)
    compared = SimpleNamespace(
        distillation_mode=distillation_mode,
        divergence=divergence,
        alpha=alpha,
        topk=topk,
        topk_of=topk_of,
        add_tail=add_tail,
        divergence_clip=None if isinstance(divergence_clip, Tensor) else divergence_clip,
    )
    own = [
        per_row(x, target_ids)[valid].to(logits) if isinstance(x, Tensor) else None
        for x in (divergence_alpha, divergence_clip)
    ]
    if teacher_topk_ids is not None and teacher_topk_log_probs is not None:
        known = teacher_topk_ids[valid], teacher_topk_log_probs[valid].detach().to(logits)
        divergences, _ = distillation.given_distillation_loss(logits, *known, compared, *own)
        teacher_entropy = distillation.bucket_entropy(known[1], known[0])
    elif teacher_hidden is not None:
        head = teacher_head(weight, bias, teacher_weight, teacher_bias)
        y = teacher_logits(
            teacher_hidden[valid],
            *head,
            teacher_transform=teacher_transform,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            project=project,
        )
        divergences, _ = distillation.distillation_loss(logits, y, ids, compared, *own)
        teacher_entropy = entropy(y)
    else:
        return TokenStats(log_probs, entropies, None, None, logsumexp)
    return TokenStats(log_probs, entropies, spread(divergences, valid), spread(teacher_entropy, valid), logsumexp)


def teacher_stats(
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    mask: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    project: Project = project_wide,
) -> TeacherStats:
    """``H(q)`` and ``log Σ_v exp(y_v)`` of every valid row, in the shape of ``teacher_hidden`` but its last axis."""
    valid = torch.ones_like(teacher_hidden[..., 0], dtype=torch.bool) if mask is None else mask
    logits = head_logits(
        teacher_hidden[valid],
        teacher_weight,
        teacher_bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        project=project,
    ).detach()
    return TeacherStats(spread(entropy(logits), valid), spread(logits.logsumexp(-1), valid))


def spread(values: Tensor, valid: Tensor) -> Tensor:
    """The values of the valid rows at their places, 0 elsewhere."""
    return values.new_zeros(valid.shape).masked_scatter(valid, values)
