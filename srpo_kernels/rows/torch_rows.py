"""The rows in torch: every device, every floating dtype.

Each pass walks over blocks of a few rows that stay in the cache; nothing of the buffer's size is allocated. Of whole
rows it *consumes* the logits: what it leaves in the buffer is what the gradient wants to find there, so that no
exponential is taken twice. Such a gradient is the buffer times a factor per row, which the products apply to their
``[n, H]`` side: a pass over the buffer less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_kernels.checks import refuse_name
from srpo_kernels.rows.contract import Coefficients, Dlogits, Holds, LogitTransform, RowSpec, Statistics
from srpo_kernels.rows.mixture import has_mixture, mixture_of
from srpo_kernels.rows.torch_blocks import (
    NATS,
    bits_at,
    bits_per_unit,
    blocks,
    divergence_gradient,
    dot,
    floor_,
    inside,
    logsumexp,
    nats_of_gradient,
    normalize_,
    scratch,
    softmax,
    to_bits_,
    to_units_,
)
from srpo_kernels.rows.torch_mixture import mix, mixture_block, to_mixture_ratio
from srpo_kernels.rows.torch_sums import mixture_sums, sums, support_sums, units

__all__ = ["dlogits_", "mixture_sums", "scratch", "slope", "sums", "support_sums", "units", "whole_rows"]


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
    """Where the gradient is of the log-probs and the entropy of one model, or of the divergence alone."""
    if teacher_logits is None:
        # The transform's derivative wants the tanh: a probability is too far from it.
        if spec.topk or spec.transform.softcap is not None or not gradient <= {"log_probs", "entropy"}:
            return None
        return _one_model(logits, spec.transform, target_ids, entropy or "entropy" in gradient)
    if spec.divergence is None or not gradient <= {"divergence"}:
        return None
    return _two_models(logits, teacher_logits, spec, target_ids, entropy, bool(gradient))


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
    logits: Tensor, teacher_logits: Tensor, spec: RowSpec, target_ids: Tensor, entropy: bool, gradient: bool
) -> Statistics:
    """Leave, with ``gradient``, dD/dlogits up to a factor."""
    transform = spec.transform
    capped, mixed = gradient and transform.softcap is not None, spec.mixture is not None
    # Without entropy, a mixture needs the student's probabilities alone and takes them in place.
    in_place = mixed and not entropy
    holds = Holds.DIVERGENCE_GRADIENT if gradient else Holds.NOTHING
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
        teacher_shift = to_bits_(y, transform, finite=not mixed)
        teacher_bits = bits_at(y, ids, teacher_shift, transform)
        if mixed:
            floor_(y)
        teacher_total = softmax(y, out=q)
        teacher_log_sum = teacher_total.log2()
        teacher_log_probs = (teacher_bits - teacher_log_sum).mul_(NATS).clamp_max_(0.0)
        teacher_entropy = teacher_log_sum - dot(q, y, out=work)

        # The logarithm of the ratio, not the difference of logarithms: of models that are nearly equal it is nearly 0.
        log_totals = (total / teacher_total).log2_()
        if has_mixture(spec.divergence):
            mixture = mixture_of(spec.divergence, spec.alpha)
            center, *kls = mixture_block(p, q, mixture, work=work, out=y)
            divergence, spare = mixture.divergence(*kls), work
        elif spec.divergence == "forward_kl":
            log_ratio, spare = z.sub_(y).sub_(log_totals), y
            center, divergence = torch.zeros_like(log_probs), -dot(q, log_ratio, out=spare)
        elif spec.divergence == "reverse_kl":
            log_ratio, spare = z.sub_(y).sub_(log_totals), y
            center = divergence = dot(p, log_ratio, out=spare)
        else:
            refuse_name("divergence", spec.divergence)
        if gradient:
            # The spare buffer holds p r.
            divergence_gradient(spare, p, q, center, spec, out=z)
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
                center=center.to(shift) * nats_of_gradient(spec),
                holds=holds,
            )
        )
    return Statistics.concatenate(parts)


def dlogits_(
    logits: Tensor,
    teacher_logits: Tensor | None,
    stats: Statistics,
    coefficients: Coefficients,
    spec: RowSpec,
    *,
    dtype: torch.dtype,
) -> Dlogits:
    """Work in place on what is in both buffers."""
    ids, at_ids, outside, _, by_log, by_divergence = coefficients
    constant = spec.transform.constant_slope
    match stats.holds:
        case Holds.LOGITS:
            _from_logits_(logits, teacher_logits, stats, coefficients, spec)
            return Dlogits(logits.to(dtype), None)
        case Holds.PROBABILITIES if by_log is None and by_divergence is None:
            # dz = -g (p - 1[v = id]): the buffer needs one number changed.
            logits.scatter_add_(1, ids, torch.full_like(at_ids, -1.0))
            return _dlogits(logits, outside[:, None] * constant, dtype)
        case Holds.LOG2_PROBABILITIES if by_divergence is None:
            for rows, (p,) in blocks(logits, 1, buffers=1):
                z = logits[rows]
                torch.exp2(z, out=p)
                _to_entropy_gradient_(z, p, stats, by_log, rows)
                z.add_(p.mul_(outside[rows, None])).scatter_(1, ids[rows], at_ids[rows])
            return _dlogits(logits, torch.full_like(outside, constant)[:, None], dtype)
        case Holds.DIVERGENCE_GRADIENT if by_divergence is not None and not ids.shape[1]:
            return _dlogits(logits, by_divergence[:, None] * (constant * nats_of_gradient(spec)), dtype)
        case holds:
            terms = {"log-probs": ids.shape[1], "entropy": by_log is not None, "divergence": by_divergence is not None}
            names = " and ".join(name for name, there in terms.items() if there)
            raise RuntimeError(f"the buffer holds {holds.value}, of which no gradient of {names} can be made")


def _from_logits_(
    logits: Tensor, teacher_logits: Tensor | None, stats: Statistics, coefficients: Coefficients, spec: RowSpec
) -> None:
    ids, at_ids, outside, log_sum, by_log, by_divergence = coefficients
    transform, taught = spec.transform, teacher_logits is not None and by_divergence is not None
    capped = transform.softcap is not None
    for rows, (p, *work) in blocks(logits, 1 + capped + 2 * taught, buffers=1 + taught):
        z, slope = logits[rows], work.pop() if capped else None
        to_units_(z, transform, slope)
        own = stats.select(rows)
        if teacher_logits is not None and taught:
            y = teacher_logits[rows]
            to_units_(y, transform)
            if spec.divergence == "reverse_kl":
                _to_log_ratio_(y, z, own, spec, p)
        normalize_(z, log_sum[rows], spec)
        torch.exp2(z, out=p)
        _to_entropy_gradient_(z, p, stats, by_log, rows)
        row, k = inside(ids[rows], z).nonzero(as_tuple=True)
        at = row, ids[rows][row, k]
        z[at] = at_ids[rows][row, k]
        if teacher_logits is not None and by_divergence is not None:
            gradient = _divergence_gradient(p, y, own, spec, *work)
            z.addcmul_(gradient, by_divergence[rows, None], value=nats_of_gradient(spec))
        p.mul_(outside[rows, None])
        p[at] = 0.0
        z.add_(p).mul_(transform.scale if slope is None else slope)


def _to_entropy_gradient_(bits: Tensor, p: Tensor, stats: Statistics, by_log: Tensor | None, rows: slice) -> None:
    """Turn log-probabilities in bits into ``by_log p (log p + H)``, 0 for want of ``by_log``."""
    if by_log is None or stats.entropy is None:
        bits.zero_()
    else:
        bits.add_(stats.entropy[rows, None] / NATS).mul_(p).mul_(NATS * by_log[rows, None])


def _to_log_ratio_(y: Tensor, z: Tensor, stats: Statistics, spec: RowSpec, work: Tensor) -> None:
    """Turn the teacher's units into the log-ratio less its mean, in bits.

    Each model's units less their log-sum-exp, the teacher's less the mean of the log-ratio as well: of a row that has
    one token alone both are exactly 0 there.
    """
    assert stats.teacher_logsumexp is not None and stats.center is not None
    nats = spec.transform.nats_per_unit
    origin, teacher_origin = stats.logsumexp / nats, (stats.teacher_logsumexp - stats.center) / nats
    high, teacher_high = origin.to(y.dtype), teacher_origin.to(y.dtype)
    low = ((origin - high) - (teacher_origin - teacher_high)).to(y.dtype)
    torch.sub(torch.sub(z, high, out=work), y.sub_(teacher_high), out=y)
    y.sub_(low).mul_(bits_per_unit(spec.transform, y.dtype))


def _divergence_gradient(p: Tensor, y: Tensor, stats: Statistics, spec: RowSpec, q: Tensor, work: Tensor) -> Tensor:
    """dD/dz up to constants, from p and the teacher's units; for reverse_kl from ``_to_log_ratio_``."""
    if spec.divergence == "reverse_kl":
        return y.mul_(p)
    assert stats.teacher_logsumexp is not None and stats.center is not None
    normalize_(y, stats.teacher_logsumexp, spec)
    torch.exp2(y, out=q)
    if spec.mixture is not None:
        to_mixture_ratio(p, q, spec.mixture, mix(p, q, spec.mixture, out=work), out=y).mul_(p)
    divergence_gradient(y, p, q, (stats.center / nats_of_gradient(spec)).to(p.dtype), spec, out=y)
    return y


def _dlogits(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Dlogits:
    if values.dtype == dtype:
        return Dlogits(values, factor)
    # A factor on low-precision hidden states would be rounded once more than one on dlogits.
    return Dlogits(values.mul_(factor).to(dtype), None)
