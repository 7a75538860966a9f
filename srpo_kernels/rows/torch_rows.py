"""The rows in torch: every device, every floating dtype.

Each pass walks over blocks of a few rows that stay in the cache; nothing of the buffer's size is allocated. Of whole
rows it *consumes* the logits: what it leaves in the buffer is what the gradient wants to find there, so that no
exponential is taken twice. Such a gradient is the buffer times a factor per row, which the products apply to their
``[n, H]`` side: a pass over the buffer less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_kernels.rows.contract import Coefficients, Dlogits, Holds, Statistics
from srpo_kernels.rows.spec import LogitTransform, RowSpec
from srpo_kernels.rows.torch_blocks import (
    NATS,
    bits_at,
    blocks,
    dot,
    floor_,
    inside,
    logsumexp,
    nats_of_gradient,
    normalize_,
    scratch,
    slope_of_units,
    softmax,
    to_bits_,
    to_units_,
)
from srpo_kernels.rows.torch_gradients import divergence_gradients
from srpo_kernels.rows.torch_mixture import mixture_block
from srpo_kernels.rows.torch_sums import divergence_sums, sums, support_sums, units

__all__ = ["divergence_sums", "dlogits_", "scaled", "scratch", "slope", "sums", "support_sums", "units", "whole_rows"]


def slope(transform: LogitTransform) -> float:
    """Exact: where the logits' own sums are rounded, it is undone."""
    return transform.nats_per_unit


def whole_rows(
    logits: Tensor,
    teacher_logits: Tensor | None,
    spec: RowSpec,
    *,
    target_ids: Tensor,
    entropy: bool,
    gradient: frozenset[str],
) -> Statistics | None:
    """Where the gradient is of one model's log-probs and entropy, or also of a divergence that is all rows'."""
    if teacher_logits is None:
        # The transform's derivative wants the tanh: a probability is too far from it.
        if spec.topk or spec.transform.softcap is not None or not gradient <= {"log_probs", "entropy"}:
            return None
        return _one_model(logits, spec.transform, target_ids, entropy or "entropy" in gradient)
    if spec.divergence is None or spec.entries is not None or spec.kls:
        return None
    beside = bool(gradient - {"divergence"})
    together = "divergence" in gradient <= {"divergence", "log_probs", "entropy"} and spec.transform.softcap is None
    if beside and not together:
        return None
    return _two_models(logits, teacher_logits, spec, target_ids, entropy or beside, bool(gradient), beside)


def _one_model(logits: Tensor, transform: LogitTransform, target_ids: Tensor, entropy: bool) -> Statistics:
    """Leave probabilities, with ``entropy`` their log2."""
    holds = Holds.LOG2_PROBABILITIES if entropy else Holds.PROBABILITIES
    parts = []
    for rows, work in blocks(logits, 1 if entropy else 0, buffers=1):
        z = logits[rows]
        shift = to_bits_(z, transform, finite=entropy)
        target_bits = bits_at(z, target_ids[rows, None], shift, transform)
        p = work[0] if entropy else z
        log_sum = softmax(z, out=p).log2_()
        log_probs = (target_bits - log_sum).squeeze(1).mul_(NATS).clamp_max_(0.0)
        entropies = None
        if entropy:
            z.sub_(log_sum)
            entropies = dot(p, z, out=p).squeeze(1).mul_(-NATS).clamp_min_(0.0)
        parts.append(Statistics(log_probs, logsumexp(shift, log_sum, transform), entropies, holds=holds))
    return Statistics.concatenate(parts)


def _two_models(
    logits: Tensor,
    teacher_logits: Tensor,
    spec: RowSpec,
    target_ids: Tensor,
    entropy: bool,
    gradient: bool,
    beside: bool,
) -> Statistics:
    """Leave, with ``gradient``, dD/dlogits up to a factor, and ``beside`` it log2 of the student's probabilities."""
    transform, mixture = spec.transform, spec.mixture
    capped, mixed = gradient and transform.softcap is not None, mixture is not None
    # Without entropy, a mixture needs the student's probabilities alone and takes them in place.
    in_place = mixed and not entropy
    holds = Holds.DIVERGENCE_GRADIENT if gradient else Holds.NOTHING
    if beside:
        holds = Holds.DIVERGENCE_GRADIENT_AND_LOG2
    parts = []
    for rows, (q, work, *more) in blocks(logits, 3 - in_place + capped, buffers=2):
        z, y, ids = logits[rows], teacher_logits[rows], target_ids[rows, None]
        slope = more.pop() if capped else None
        p = z if in_place else more.pop()
        shift = to_bits_(z, transform, slope, finite=not mixed)
        target_bits = bits_at(z, ids, shift, transform)
        if mixed:
            floor_(z)
        total = softmax(z, out=p)
        log_sum = total.log2()
        log_probs = (target_bits - log_sum).mul_(NATS).clamp_max_(0.0)
        entropies = (log_sum - dot(p, z, out=work)).squeeze(1).mul_(NATS).clamp_min_(0.0) if entropy else None
        teacher_shift = to_bits_(y, spec.teacher_transform, finite=not mixed)
        teacher_bits = bits_at(y, ids, teacher_shift, transform)
        if mixed:
            floor_(y)
        teacher_total = softmax(y, out=q)
        teacher_log_sum = teacher_total.log2()
        teacher_log_probs = (teacher_bits - teacher_log_sum).mul_(NATS).clamp_max_(0.0)
        teacher_entropy = teacher_log_sum - dot(q, y, out=work)

        if mixture is not None:
            # What work ends up with is p r.
            center, *kls = mixture_block(p, q, mixture, work=work, out=y)
            divergence = mixture.divergence(*kls)
            if beside:
                torch.sub(z, log_sum, out=y)
            if gradient:
                torch.addcmul(work, p, center, value=-1.0, out=z)
        else:
            # The logarithm of the ratio, not the difference of logarithms: of nearly equal models it is nearly 0.
            log_ratio = torch.sub(z, y, out=y).sub_((total / teacher_total).log2_())
            if beside:
                torch.sub(z, log_sum, out=work)
            if spec.kl == "forward_kl":
                center, divergence = torch.zeros_like(log_probs), -dot(q, log_ratio, out=z)
                torch.sub(p, q, out=z)
            else:
                center = divergence = dot(p, log_ratio, out=z)
                z.addcmul_(p, center, value=-1.0)
            if beside:
                y.copy_(work)
        if slope is not None:
            z.mul_(slope)
        parts.append(
            Statistics(
                log_probs.squeeze(1),
                logsumexp(shift, log_sum, transform),
                entropies,
                teacher_log_probs=teacher_log_probs.squeeze(1),
                teacher_logsumexp=logsumexp(teacher_shift, teacher_log_sum, transform),
                teacher_entropy=teacher_entropy.squeeze(1).clamp_min(0.0) * NATS,
                divergence=divergence.squeeze(1).clamp_min(0.0) * NATS,
                holds=holds,
            )
        )
    return Statistics.concatenate(parts)


def scaled(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A CPU reads the factor; a device's queue would stall."""
    is_one = factor.device.type == "cpu" and factor.item() == 1.0
    return (values if is_one else values.mul_(factor)).to(dtype)


def dlogits_(
    logits: Tensor,
    teacher_logits: Tensor | None,
    stats: Statistics,
    coefficients: Coefficients,
    spec: RowSpec,
    *,
    out: Tensor,
) -> Dlogits:
    """Work in place on what is in both buffers."""
    ids, at_ids, outside, _, by_log = coefficients[:5]
    # A buffer holds one divergence's, whichever it is.
    constant, by_divergence = spec.transform.constant_slope, next((x for x in coefficients[5:] if x is not None), None)
    match stats.holds:
        case Holds.LOGITS:
            _from_logits_(logits, teacher_logits, stats, coefficients, spec)
            return _dlogits(logits, None, out)
        case Holds.PROBABILITIES if by_log is None and by_divergence is None:
            # dz = -g (p - 1[v = id]): the buffer needs one number changed.
            logits.scatter_add_(1, ids, torch.full_like(at_ids, -1.0))
            return _dlogits(logits, outside[:, None] * constant, out)
        case Holds.LOG2_PROBABILITIES if by_divergence is None:
            for rows, (p,) in blocks(logits, 1, buffers=1):
                _add_up_(logits[rows], p, stats, coefficients, rows)
            return _dlogits(logits, torch.full_like(outside, constant)[:, None], out)
        case Holds.DIVERGENCE_GRADIENT_AND_LOG2 if by_divergence is not None and teacher_logits is not None:
            for rows, (p,) in blocks(logits, 1, buffers=2):
                bits = teacher_logits[rows]
                _add_up_(bits, p, stats, coefficients, rows)
                torch.addcmul(bits, logits[rows], by_divergence[rows, None] * nats_of_gradient(spec), out=logits[rows])
            return _dlogits(logits, torch.full_like(outside, constant)[:, None], out)
        case Holds.DIVERGENCE_GRADIENT if by_divergence is not None and not ids.shape[1]:
            return _dlogits(logits, by_divergence[:, None] * (constant * nats_of_gradient(spec)), out)
        case holds:
            terms = {"log-probs": ids.shape[1], "entropy": by_log is not None, "divergence": by_divergence is not None}
            names = " and ".join(name for name, there in terms.items() if there)
            raise RuntimeError(f"the buffer holds {holds.value}, of which no gradient of {names} can be made")


def _from_logits_(
    logits: Tensor, teacher_logits: Tensor | None, stats: Statistics, coefficients: Coefficients, spec: RowSpec
) -> None:
    ids, at_ids, outside, log_sum, by_log = coefficients[:5]
    transform, capped = spec.transform, spec.transform.softcap is not None
    taught = teacher_logits is not None and coefficients.compares
    # The divergences' work is done before the slope is taken.
    last = capped or (taught and spec.entries is not None)
    for rows, (p, *work) in blocks(logits, 1 + last + 3 * taught, buffers=1 + taught):
        z = logits[rows]
        to_units_(z, transform)
        own, of_teacher = stats.select(rows), None
        if teacher_logits is not None and taught:
            y = teacher_logits[rows]
            to_units_(y, spec.teacher_transform)
            of_teacher = divergence_gradients(z, y, own, coefficients.select(rows), spec, rows, p, work)
        slope = slope_of_units(z, transform, out=work[-1]) if capped else None
        normalize_(z, log_sum[rows], spec)
        torch.exp2(z, out=p)
        _to_entropy_gradient_(z, p, stats, by_log, rows)
        row, k = inside(ids[rows], z).nonzero(as_tuple=True)
        at = row, ids[rows][row, k]
        z[at] = at_ids[rows][row, k]
        if of_teacher is not None:
            z.add_(of_teacher)
        p.mul_(outside[rows, None])
        p[at] = 0.0
        z.add_(p).mul_(transform.scale if slope is None else slope)


def _add_up_(bits: Tensor, p: Tensor, stats: Statistics, coefficients: Coefficients, rows: slice) -> None:
    """Turn log-probabilities in bits into the gradient of log-probs and entropy; ``p`` takes the probabilities."""
    ids, at_ids, outside, _, by_log = coefficients[:5]
    torch.exp2(bits, out=p)
    _to_entropy_gradient_(bits, p, stats, by_log, rows)
    bits.add_(p.mul_(outside[rows, None])).scatter_(1, ids[rows], at_ids[rows])


def _to_entropy_gradient_(bits: Tensor, p: Tensor, stats: Statistics, by_log: Tensor | None, rows: slice) -> None:
    """Turn log-probabilities in bits into ``by_log p (log p + H)``, 0 for want of ``by_log``."""
    if by_log is None or stats.entropy is None:
        bits.zero_()
    else:
        bits.add_(stats.entropy[rows, None] / NATS).mul_(p).mul_(NATS * by_log[rows, None])


def _dlogits(values: Tensor, factor: Tensor | None, out: Tensor) -> Dlogits:
    if out.dtype == values.dtype:
        return Dlogits(values, factor)
    # A factor on low-precision hidden states would be rounded once more than one on dlogits.
    return Dlogits(out.copy_(values if factor is None else values.mul_(factor)), None)
