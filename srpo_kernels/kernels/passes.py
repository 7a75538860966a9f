"""The row passes in Triton: what ``rows_torch`` computes, in one kernel per pass, from fp32 logits.

A statistics' pass leaves the logits as they are; a gradient's pass reads them once more and writes dlogits over them,
or into a buffer of the products' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_kernels.kernels.launchers import launch_row_grad, launch_row_jsd, launch_row_stats
from srpo_kernels.kernels.primitives import LOWEST
from srpo_kernels.kernels.sums import ModelSums, Transform, finish_divergence, finish_row, merge
from srpo_kernels.rows import DivergenceStats, Dlogits, RowGradients, RowSpec, RowStats, Scratch


def scratch(vocab_size: int, device: torch.device) -> Scratch:
    """Nothing of a row's size."""
    return Scratch(0, 0)


def row_stats(
    logits: Tensor,
    spec: RowSpec,
    *,
    target_ids: Tensor,
    support_ids: Tensor | None = None,
    entropy: bool = False,
) -> RowStats:
    """Leave the logits as they are."""
    transform = Transform.of(spec)
    if spec.topk and support_ids is None:
        support_ids = logits.topk(spec.topk, dim=1).indices
    if support_ids is None:
        (sums,) = launch_row_stats(logits, None, transform, target_ids)
        return finish_row(sums, transform, entropy=entropy)

    # The support is taken out of the row for as long as its complement is summed: 1 - sum(support) would lose a small
    # tail to rounding.
    support_logits = logits.gather(1, support_ids)
    targets = transform.units(logits.gather(1, target_ids[:, None]).squeeze(1))
    logits.scatter_(1, support_ids, LOWEST.value)
    (complement,) = launch_row_stats(logits, None, transform, target_ids)
    logits.scatter_(1, support_ids, support_logits)
    units = transform.units(support_logits)
    pairs = zip(complement, ModelSums.of_support(units, transform), strict=True)
    (sums,) = merge([ModelSums._make(map(torch.stack, pairs))], transform)
    sums = sums._replace(target=targets)
    stats = finish_row(sums, transform, entropy=entropy)
    log_probs = transform.slope * (units - sums.maximum[:, None]) - sums.total.log()[:, None]
    log_tail = None
    if spec.add_tail:
        log_tail = (complement.logsumexp(transform) - stats.logsumexp.squeeze(1)).to(logits.dtype)
    return stats._replace(support_ids=support_ids, support_log_probs=log_probs, log_tail=log_tail)


def divergence_stats(
    student_logits: Tensor,
    teacher_logits: Tensor,
    spec: RowSpec,
    *,
    target_ids: Tensor,
    gradient: bool,
    entropy: bool = False,
) -> DivergenceStats:
    """Leave both models' logits as they are."""
    transform = Transform.of(spec)
    student, teacher = launch_row_stats(student_logits, teacher_logits, transform, target_ids)
    stats = finish_divergence(student, teacher, spec, transform, entropy=entropy)
    if spec.divergence != "jsd":
        return stats
    kl, teacher_kl = launch_row_jsd(student_logits, teacher_logits, stats.logsumexp, stats.teacher_logsumexp, spec)
    return stats._replace(divergence=(1.0 - spec.alpha) * kl + spec.alpha * teacher_kl, center=kl[:, None])


def log_prob_gradient_(
    logits: Tensor,
    stats: RowStats,
    spec: RowSpec,
    *,
    ids: Tensor,
    log_probs: Tensor,
    grad_log_probs: Tensor,
    grad_tail: Tensor | None = None,
    grad_entropy: Tensor | None = None,
    dtype: torch.dtype,
) -> Dlogits:
    """Write over the logits, or into a new buffer of ``dtype``."""
    total = grad_log_probs.sum(1)
    outside = -total
    if grad_tail is not None and stats.log_tail is not None:
        total = total + grad_tail
        outside = grad_tail * torch.exp(-stats.log_tail) - total
    by_log = torch.zeros_like(total)
    entropy_term = by_log
    if grad_entropy is not None and stats.entropy is not None:
        by_log, entropy_term = -grad_entropy, -grad_entropy * stats.entropy
    values = launch_row_grad(
        logits,
        None,
        spec,
        logsumexp=stats.logsumexp,
        teacher_logsumexp=None,
        by_p=outside + entropy_term,
        by_log=by_log,
        by_divergence=torch.zeros_like(total),
        by_p_at_ids=-total + entropy_term,
        ids=ids,
        id_grads=grad_log_probs,
        dtype=dtype,
    )
    return Dlogits(values, None)


def divergence_gradient_(
    student_logits: Tensor,
    teacher_logits: Tensor,
    stats: DivergenceStats,
    spec: RowSpec,
    *,
    grad_divergence: Tensor,
    dtype: torch.dtype,
) -> Dlogits:
    """Write over the student's logits, or into a new buffer of ``dtype``."""
    nothing = torch.zeros_like(grad_divergence)
    values = _slice_gradient(
        student_logits,
        teacher_logits,
        stats._replace(entropy=None),
        RowGradients(nothing, nothing, grad_divergence),
        spec,
        ids=torch.full_like(grad_divergence, -1, dtype=torch.int64),
        dtype=dtype,
    )
    return Dlogits(values, None)


def slice_gradient_(
    logits: Tensor,
    teacher_logits: Tensor | None,
    stats: RowStats | DivergenceStats,
    grads: RowGradients,
    spec: RowSpec,
    *,
    target_ids: Tensor,
    first_id: int,
    dtype: torch.dtype,
) -> Tensor:
    """Write over the logits, or into a new buffer of ``dtype``."""
    return _slice_gradient(logits, teacher_logits, stats, grads, spec, ids=target_ids - first_id, dtype=dtype)


def _slice_gradient(
    logits: Tensor,
    teacher_logits: Tensor | None,
    stats: RowStats | DivergenceStats,
    grads: RowGradients,
    spec: RowSpec,
    *,
    ids: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Dlogits of the slice in which the targets are ``ids`` ``[n]``; those outside of it are another slice's."""
    by_p, by_log = -grads.log_probs, torch.zeros_like(grads.log_probs)
    if stats.entropy is not None:
        by_log = -grads.entropy
        by_p = by_p - grads.entropy * stats.entropy
    by_divergence, teacher_lse = torch.zeros_like(by_p), None
    if isinstance(stats, DivergenceStats) and grads.divergence is not None:
        teacher_lse = stats.teacher_logsumexp
        by_divergence = grads.divergence * spec.divergence_slope
        # p - q for forward_kl, p (log-ratio - center) for the others.
        by_p = by_p + by_divergence * (1.0 if spec.divergence == "forward_kl" else -stats.center.squeeze(1))
    return launch_row_grad(
        logits,
        teacher_logits,
        spec,
        logsumexp=stats.logsumexp,
        teacher_logsumexp=teacher_lse,
        by_p=by_p,
        by_log=by_log,
        by_divergence=by_divergence,
        by_p_at_ids=by_p,
        ids=ids[:, None],
        id_grads=grads.log_probs[:, None],
        dtype=dtype,
    )
