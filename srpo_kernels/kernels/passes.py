"""The row passes in Triton: what ``rows_torch`` computes, in one kernel per pass, from fp32 logits.

A whole row is a slice of the vocabulary like another (``slices``). A statistics' pass leaves the logits as they are; a
gradient's pass reads them once more and writes dlogits over them, or into a buffer of the products' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_kernels.kernels import slices
from srpo_kernels.kernels.slices import log_prob_gradient_, scratch
from srpo_kernels.rows.contract import DivergenceStats, Dlogits, RowGradients, RowSpec, RowStats
from srpo_kernels.rows.sums import finish_divergence, finish_row, finish_support

__all__ = [
    "divergence_gradient_",
    "divergence_stats",
    "log_prob_gradient_",
    "row_stats",
    "scratch",
]


def row_stats(
    logits: Tensor,
    spec: RowSpec,
    *,
    target_ids: Tensor,
    support_ids: Tensor | None = None,
    entropy: bool = False,
) -> RowStats:
    """Leave the logits as they are."""
    slope = slices.slope(spec)
    if spec.topk and support_ids is None:
        support_ids = logits.topk(spec.topk, dim=1).indices
    if support_ids is None:
        (sums,) = slices.model_sums(logits, None, spec, target_ids=target_ids)
        return finish_row(sums, slope, entropy=entropy)
    complement, units = slices.support_sums(logits, spec, target_ids=target_ids, support_ids=support_ids)
    return finish_support(complement, units, support_ids, spec, slope, entropy=entropy)


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
    student, teacher = slices.model_sums(student_logits, teacher_logits, spec, target_ids=target_ids)
    stats = finish_divergence(student, teacher, spec, slices.slope(spec), entropy=entropy)
    if spec.divergence != "jsd":
        return stats
    sums = slices.jsd_sums(student_logits, teacher_logits, stats.logsumexp, stats.teacher_logsumexp, spec)
    return stats.with_jsd(*slices.finish_jsd(sums, stats.logsumexp, stats.teacher_logsumexp, spec), spec)


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
    values = slices.gradient_(
        student_logits,
        teacher_logits,
        stats._replace(entropy=None),
        RowGradients(nothing, nothing, grad_divergence),
        spec,
        target_ids=torch.full_like(grad_divergence, -1, dtype=torch.int64),
        dtype=dtype,
    )
    return Dlogits(values, None)
