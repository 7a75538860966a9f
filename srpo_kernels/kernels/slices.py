"""The passes over a slice of the vocabulary in Triton, one kernel per pass, from fp32 logits."""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_kernels.kernels.launchers import finish_jsd, launch_row_grad, launch_row_jsd, launch_row_stats
from srpo_kernels.kernels.transform import Transform
from srpo_kernels.rows.contract import (
    LOWEST,
    DivergenceStats,
    Dlogits,
    RowGradients,
    RowSpec,
    RowStats,
    Scratch,
    support_coefficients,
)
from srpo_kernels.rows.sums import ModelSums

__all__ = [
    "finish_jsd",
    "gradient_",
    "jsd_sums",
    "log_prob_gradient_",
    "model_sums",
    "scratch",
    "slope",
    "support_sums",
]


def scratch(vocab_size: int, device: torch.device) -> Scratch:
    """Nothing of a row's size."""
    return Scratch(0, 0)


def slope(spec: RowSpec) -> float:
    """Nats per raw logit, or per tanh of one."""
    return Transform.of(spec).slope


def model_sums(logits: Tensor, teacher_logits: Tensor | None, spec: RowSpec, *, target_ids: Tensor) -> list[ModelSums]:
    """One pass over one or both models' logits."""
    return launch_row_stats(logits, teacher_logits, Transform.of(spec), target_ids)


def support_sums(logits: Tensor, spec: RowSpec, *, target_ids: Tensor, support_ids: Tensor) -> tuple[ModelSums, Tensor]:
    """The support is taken out of the logits for as long as the others are summed."""
    transform = Transform.of(spec)
    (ids, here), (target, target_here) = (_within(x, logits) for x in (support_ids, target_ids[:, None]))
    own = logits.gather(1, ids)
    targets = transform.units(logits.gather(1, target)).masked_fill(~target_here, LOWEST).squeeze(1)
    # Under a softcap an excluded token has a logit, unlike one that is taken out: above the mark of that.
    logits.scatter_(1, ids, own.clamp_min(0.5 * LOWEST))
    # An id of another slice stands at one of this slice that may be in the support as well: the least value counts.
    logits.scatter_reduce_(1, ids, own.masked_fill(here, LOWEST), "amin")
    (complement,) = launch_row_stats(logits, None, transform, target_ids)
    logits.scatter_(1, ids, own)
    return complement._replace(target=targets), transform.units(own).masked_fill(~here, LOWEST)


def _within(ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest ids of the slice, and which are the very ones."""
    nearest = ids.clamp(0, logits.shape[1] - 1)
    return nearest, nearest == ids


def jsd_sums(
    student_logits: Tensor, teacher_logits: Tensor, logsumexp: Tensor, teacher_logsumexp: Tensor, spec: RowSpec
) -> Tensor:
    """In bits, and off by what the log-sum-exps lack in fp32: ``finish_jsd`` sees to both."""
    return launch_row_jsd(student_logits, teacher_logits, logsumexp, teacher_logsumexp, spec)


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
    if grad_tail is not None and grad_entropy is not None:
        raise NotImplementedError("an entropy's gradient needs the softmax of the row, a tail's that of the rest alone")
    at_ids, outside = support_coefficients(log_probs, grad_log_probs, grad_tail, stats.log_tail)
    by_log = entropy_term = torch.zeros_like(outside)
    log_sum = stats.logsumexp
    if grad_entropy is not None and stats.entropy is not None:
        by_log, entropy_term = -grad_entropy, -grad_entropy * stats.entropy
    if grad_tail is not None and stats.tail_logsumexp is not None:
        # The softmax is that of the rest of the row alone. If that is excluded tokens, it has no probability, and a
        # log-sum-exp that fp32 is too coarse for.
        empty = stats.tail_logsumexp < 0.5 * LOWEST * slope(spec)
        log_sum = stats.tail_logsumexp.where(~empty, stats.logsumexp)
    values = launch_row_grad(
        logits,
        None,
        spec,
        logsumexp=log_sum,
        teacher_logsumexp=None,
        center=None,
        by_p=outside + entropy_term,
        by_log=by_log,
        by_divergence=torch.zeros_like(outside),
        by_p_at_ids=entropy_term,
        ids=ids,
        id_grads=at_ids,
        dtype=dtype,
    )
    return Dlogits(values, None)


def gradient_(
    logits: Tensor,
    teacher_logits: Tensor | None,
    stats: RowStats | DivergenceStats,
    grads: RowGradients,
    spec: RowSpec,
    *,
    target_ids: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Write over the logits, or into a new buffer of ``dtype``."""
    by_log, by_divergence = torch.zeros_like(grads.log_probs), torch.zeros_like(grads.log_probs)
    by_p, teacher_lse, center = by_log, None, None
    if stats.entropy is not None:
        by_log, by_p = -grads.entropy, -grads.entropy * stats.entropy
    if isinstance(stats, DivergenceStats) and grads.divergence is not None:
        teacher_lse, center = stats.teacher_logsumexp, stats.center
        by_divergence = grads.divergence * spec.divergence_slope
        if spec.divergence == "forward_kl":
            by_p = by_p + by_divergence
    log_probs, upstream = stats.log_probs[:, None], grads.log_probs[:, None]
    at_ids, outside = support_coefficients(log_probs, upstream, None, None)
    return launch_row_grad(
        logits,
        teacher_logits,
        spec,
        logsumexp=stats.logsumexp,
        teacher_logsumexp=teacher_lse,
        center=center,
        by_p=by_p + outside,
        by_log=by_log,
        by_divergence=by_divergence,
        by_p_at_ids=by_p,
        ids=target_ids[:, None],
        id_grads=at_ids,
        dtype=dtype,
    )
