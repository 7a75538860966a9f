"""The row passes in torch: every device, every floating dtype.

Each pass walks over blocks of a few rows that stay in the cache and works in place on the caller's buffer; nothing of
the buffer's size is allocated. A pass *consumes* the logits: what it leaves in the buffer is what the matching gradient
wants to find there, so that no exponential is taken twice. A gradient is the buffer times a factor per row, which the
products apply to their ``[n, H]`` side: a pass over the buffer less.

- ``row_stats`` leaves probabilities, or their logarithms where the gradient needs them (entropy), or the logits where
  there is a softcap or a support; ``log_prob_gradient_`` turns any of them into dlogits.
- ``divergence_stats`` leaves dD/dlogits up to the factor of ``divergence_gradient_``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_kernels.checks import refuse_name
from srpo_kernels.rows import torch_slices as slices_torch
from srpo_kernels.rows.contract import DivergenceStats, Dlogits, Holds, RowSpec, RowStats, support_coefficients
from srpo_kernels.rows.sums import finish_row, finish_support
from srpo_kernels.rows.torch_blocks import (
    NATS,
    bits_at,
    blocks,
    divergence_gradient,
    dot,
    floor_,
    log_ratio_to_mixture,
    logsumexp,
    nats_per_unit,
    scratch,
    slope_of_bits,
    softmax,
    to_bits_,
)

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
    """Leave probabilities in ``logits``, with ``entropy`` their log2, with a softcap or a support the logits."""
    slope = nats_per_unit(spec)
    if spec.topk and support_ids is None:
        support_ids = logits.topk(spec.topk, dim=1).indices
    if support_ids is not None:
        sums, units = slices_torch.support_sums(logits, spec, target_ids=target_ids, support_ids=support_ids)
        return finish_support(sums, units, support_ids, spec, slope, entropy=entropy)
    if spec.softcap is not None:
        # The transform's derivative wants the tanh: a probability is too far from it.
        (sums,) = slices_torch.model_sums(logits, None, spec, target_ids=target_ids)
        return finish_row(sums, slope, entropy=entropy)
    holds = Holds.LOG2_PROBABILITIES if entropy else Holds.PROBABILITIES
    parts = []
    for rows, work in blocks(logits, 1 if entropy else 0, buffers=1):
        z = logits[rows]
        shift = to_bits_(z, spec, finite=entropy)
        target_bits = bits_at(z, target_ids[rows, None], shift, spec)
        p = work[0] if entropy else z
        log_sum = softmax(z, out=p).log2_()
        log_probs = (target_bits - log_sum).squeeze(1).mul_(NATS).clamp_max_(0.0)
        entropies = None
        if entropy:
            z.sub_(log_sum)
            entropies = dot(p, z, out=p).squeeze(1).mul_(-NATS).clamp_min_(0.0)
        parts.append(RowStats(log_probs, logsumexp(shift, log_sum, spec), entropies, None, None, None, holds))
    return RowStats.concatenate(parts)


def divergence_stats(
    student_logits: Tensor,
    teacher_logits: Tensor,
    spec: RowSpec,
    *,
    target_ids: Tensor,
    gradient: bool,
    entropy: bool = False,
) -> DivergenceStats:
    """Leave, with ``gradient``, dD/dlogits in ``student_logits`` up to the factor of ``divergence_gradient_``."""
    capped, jsd = gradient and spec.softcap is not None, spec.divergence == "jsd"
    # Without entropy, jsd needs the student's probabilities alone and takes them in place.
    in_place = jsd and not entropy
    holds = Holds.DIVERGENCE_GRADIENT if gradient else Holds.NOTHING
    parts = []
    for rows, (q, work, *more) in blocks(student_logits, 3 - in_place + capped, buffers=2):
        z, y = student_logits[rows], teacher_logits[rows]
        slope = more.pop() if capped else None
        p = z if in_place else more.pop()
        shift = to_bits_(z, spec, slope, finite=not jsd)
        target_bits = bits_at(z, target_ids[rows, None], shift, spec)
        if jsd:
            floor_(z)
        total = softmax(z, out=p)
        log_sum = total.log2()
        log_probs = (target_bits - log_sum).mul_(NATS).clamp_max_(0.0)
        entropies = (log_sum - dot(p, z, out=work)).squeeze(1).mul_(NATS).clamp_min_(0.0) if entropy else None
        teacher_shift = to_bits_(y, spec, finite=not jsd)
        if jsd:
            floor_(y)
        teacher_total = softmax(y, out=q)
        teacher_log_sum = teacher_total.log2()
        teacher_entropy = teacher_log_sum - dot(q, y, out=work)

        # The logarithm of the ratio, not the difference of logarithms: of models that are nearly equal it is nearly 0.
        log_totals = (total / teacher_total).log2_()
        match spec.divergence:
            case "jsd":
                log_ratio, spare = log_ratio_to_mixture(p, q, spec, mixture=work, out=y), work
                teacher_kl = dot(q, torch.div(q, work, out=work).log2_(), out=work)
                center = dot(p, log_ratio, out=spare)
                divergence = center * (1.0 - spec.alpha) + teacher_kl * spec.alpha
            case "forward_kl":
                log_ratio, spare = z.sub_(y).sub_(log_totals), y
                center, divergence = torch.zeros_like(log_probs), -dot(q, log_ratio, out=spare)
            case "reverse_kl":
                log_ratio, spare = z.sub_(y).sub_(log_totals), y
                center = divergence = dot(p, log_ratio, out=spare)
            case unknown:
                refuse_name("divergence", unknown)
        if gradient:
            # The spare buffer holds p times the log-ratio.
            divergence_gradient(spare, p, q, center, spec, out=z)
            if slope is not None:
                z.mul_(slope)
        parts.append(
            DivergenceStats(
                log_probs.squeeze(1),
                logsumexp(shift, log_sum, spec),
                entropies,
                logsumexp(teacher_shift, teacher_log_sum, spec),
                teacher_entropy.squeeze(1).clamp_min(0.0) * NATS,
                divergence.squeeze(1).clamp_min(0.0) * NATS,
                center.to(shift) * NATS,
                holds,
            )
        )
    return DivergenceStats.concatenate(parts)


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
    """Work in place on what ``row_stats`` left in ``logits``."""
    if stats.holds is Holds.LOGITS:
        return slices_torch.log_prob_gradient_(
            logits,
            stats,
            spec,
            ids=ids,
            log_probs=log_probs,
            grad_log_probs=grad_log_probs,
            grad_tail=grad_tail,
            grad_entropy=grad_entropy,
            dtype=dtype,
        )
    if stats.holds is Holds.PROBABILITIES and grad_entropy is None:
        # dz = -g (p - 1[v = id]): the buffer needs one number changed.
        logits.scatter_add_(1, ids, torch.full_like(grad_log_probs, -1.0))
        return _dlogits(logits, -grad_log_probs * spec.constant_slope, dtype)
    _require(stats.holds, Holds.LOG2_PROBABILITIES)
    at_ids, outside = support_coefficients(log_probs, grad_log_probs, grad_tail, stats.log_tail)
    for rows, (p,) in blocks(logits, 1, buffers=1):
        z = logits[rows]
        torch.exp2(z, out=p)
        if grad_entropy is not None and stats.entropy is not None:
            z.add_(stats.entropy[rows, None] / NATS).mul_(p).mul_(-NATS * grad_entropy[rows, None])
        else:
            z.zero_()
        z.add_(p.mul_(outside[rows, None]).scatter_(1, ids[rows], at_ids[rows]))
    return _dlogits(logits, torch.full_like(outside, spec.constant_slope)[:, None], dtype)


def divergence_gradient_(
    student_logits: Tensor,
    teacher_logits: Tensor,
    stats: DivergenceStats,
    spec: RowSpec,
    *,
    grad_divergence: Tensor,
    dtype: torch.dtype,
) -> Dlogits:
    """Apply a factor to what ``divergence_stats`` left."""
    _require(stats.holds, Holds.DIVERGENCE_GRADIENT)
    factor = grad_divergence[:, None] * (spec.constant_slope * slope_of_bits(spec))
    return _dlogits(student_logits, factor, dtype)


def _require(holds: Holds, wanted: Holds) -> None:
    if holds is not wanted:
        raise RuntimeError(f"a gradient needs {wanted.value} in the buffer, which holds {holds.value}")


def _dlogits(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Dlogits:
    if values.dtype == dtype:
        return Dlogits(values, factor)
    # A factor on low-precision hidden states would be rounded once more than one on dlogits.
    return Dlogits(values.mul_(factor).to(dtype), None)
