"""The passes over a slice of the vocabulary in torch: every device, every floating dtype.

Unlike the passes over whole rows they leave the logits as they are until the gradient, for their results are worth
nothing before the other slices' are there. A unit is a raw logit, or the tanh of one with a softcap.
"""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_kernels.rows.contract import (
    LOWEST,
    DivergenceStats,
    Dlogits,
    RowGradients,
    RowSpec,
    RowStats,
    support_coefficients,
)
from srpo_kernels.rows.sums import ModelSums
from srpo_kernels.rows.torch_blocks import (
    NATS,
    argmax,
    bits_per_unit,
    blocks,
    divergence_gradient,
    dot,
    log_ratio_to_mixture,
    nats_per_unit,
    normalize_,
    scratch,
    slope_of_bits,
    to_units_,
)

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


def slope(spec: RowSpec) -> float:
    """Nats per raw logit, or per tanh of one."""
    return nats_per_unit(spec)


def model_sums(logits: Tensor, teacher_logits: Tensor | None, spec: RowSpec, *, target_ids: Tensor) -> list[ModelSums]:
    """One pass over one or both models' logits, in copies of a few rows."""
    parts, by = [], bits_per_unit(spec, logits.dtype)
    for rows, (z, e, *pair) in blocks(logits, 2 if teacher_logits is None else 5, buffers=2):
        to_units_(z.copy_(logits[rows]), spec)
        target = _at(z, target_ids[rows, None]).squeeze(1)
        if teacher_logits is None:
            parts.append([_sums(z, None, None, target, e, e, by)])
            continue
        y, gap, work = pair
        to_units_(y.copy_(teacher_logits[rows]), spec)
        nowhere = torch.full_like(target, LOWEST)
        ids = argmax(z)
        anchor, z_max, y_max = y.gather(1, ids), z.gather(1, ids), y.amax(1, keepdim=True)
        torch.sub(z, y, out=gap)
        student = _sums(z, gap, z_max - anchor, target, e, work, by)
        teacher = _sums(y, gap, z_max - y_max, nowhere, e, work, by)
        parts.append([student._replace(anchor=anchor.squeeze(1)), teacher])
    return [_concatenate(model) for model in zip(*parts, strict=True)]


def support_sums(logits: Tensor, spec: RowSpec, *, target_ids: Tensor, support_ids: Tensor) -> tuple[ModelSums, Tensor]:
    """The support is taken out of copies of a few rows."""
    parts, support, by = [], [], bits_per_unit(spec, logits.dtype)
    for rows, (z, e) in blocks(logits, 2, buffers=1):
        to_units_(z.copy_(logits[rows]), spec)
        ids = support_ids[rows]
        target = _at(z, target_ids[rows, None]).squeeze(1)
        support.append(_at(z, ids))
        row, k = _inside(ids, z).nonzero(as_tuple=True)
        z[row, ids[row, k]] = LOWEST
        parts.append(_sums(z, None, None, target, e, e, by))
    return _concatenate(parts), torch.cat(support)


def jsd_sums(
    student_logits: Tensor, teacher_logits: Tensor, logsumexp: Tensor, teacher_logsumexp: Tensor, spec: RowSpec
) -> Tensor:
    """In bits, from probabilities that are good to the last digits."""
    parts = []
    for rows, (p, q, mixture, ratio) in blocks(student_logits, 4, buffers=2):
        for out, logits, lse in ((p, student_logits, logsumexp), (q, teacher_logits, teacher_logsumexp)):
            to_units_(out.copy_(logits[rows]), spec)
            normalize_(out, lse[rows], spec)
            out.exp2_()
        log_ratio_to_mixture(p, q, spec, mixture=mixture, out=ratio)
        kl = dot(p, ratio, out=ratio)
        torch.div(q, mixture, out=ratio).log2_()
        parts.append(torch.cat([kl, dot(q, ratio, out=ratio)], dim=1))
    return torch.cat(parts)


def finish_jsd(sums: Tensor, logsumexp: Tensor, teacher_logsumexp: Tensor, spec: RowSpec) -> tuple[Tensor, Tensor]:
    """The sums are the divergences, in bits."""
    kl, teacher_kl = (sums * NATS).unbind(1)
    return kl, teacher_kl


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
    """Write over the logits."""
    if grad_tail is not None and grad_entropy is not None:
        raise NotImplementedError("an entropy's gradient needs the softmax of the row, a tail's that of the rest alone")
    at_ids, outside = support_coefficients(log_probs, grad_log_probs, grad_tail, stats.log_tail)
    # With a tail the softmax is that of the rest of the row alone.
    log_sum = stats.logsumexp if grad_tail is None or stats.tail_logsumexp is None else stats.tail_logsumexp
    for rows, (p, slope) in blocks(logits, 2, buffers=1):
        z = logits[rows]
        to_units_(z, spec, slope)
        normalize_(z, log_sum[rows], spec)
        torch.exp2(z, out=p)
        if grad_entropy is not None and stats.entropy is not None:
            z.add_(stats.entropy[rows, None] / NATS).mul_(p).mul_(-NATS * grad_entropy[rows, None])
        else:
            z.zero_()
        p.mul_(outside[rows, None])
        row, k = _inside(ids[rows], z).nonzero(as_tuple=True)
        p[row, ids[rows][row, k]] = at_ids[rows][row, k]
        z.add_(p).mul_(spec.scale if spec.softcap is None else slope)
    return Dlogits(logits.to(dtype), None)


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
    """Work in place on both models' logits."""
    inside = _inside(target_ids, logits)
    at_ids, outside = support_coefficients(stats.log_probs[:, None], grads.log_probs[:, None], None, None)

    for rows, (p, q, work, total, *slope) in blocks(logits, 4 if spec.softcap is None else 5, buffers=2):
        z, y = logits[rows], None
        to_units_(z, spec, *slope)
        if grads.divergence is not None and isinstance(stats, DivergenceStats) and teacher_logits is not None:
            y = teacher_logits[rows]
            to_units_(y, spec)
            if spec.divergence == "reverse_kl":
                _to_log_ratio_(y, z, stats.select(rows), spec, work)
        normalize_(z, stats.logsumexp[rows], spec)
        torch.exp2(z, out=p)
        torch.mul(p, outside[rows, None], out=total)
        (here,) = inside[rows].nonzero(as_tuple=True)
        total[here, target_ids[rows][here]] = at_ids[rows][here, 0]
        if stats.entropy is not None:
            torch.add(z, stats.entropy[rows, None] / NATS, out=work)
            total.addcmul_(work.mul_(p), grads.entropy[rows, None], value=-NATS)
        if grads.divergence is not None and isinstance(stats, DivergenceStats) and y is not None:
            _divergence_gradient(p, y, stats.select(rows), spec, q, work, out=z)
            total.addcmul_(z, grads.divergence[rows, None], value=slope_of_bits(spec))
        torch.mul(total, *slope or (spec.scale,), out=z)
    return logits.to(dtype)


def _to_log_ratio_(y: Tensor, z: Tensor, stats: DivergenceStats, spec: RowSpec, work: Tensor) -> None:
    """Turn the teacher's units into the log-ratio less its mean, in bits.

    Each model's units less their log-sum-exp, the teacher's less the mean of the log-ratio as well: of a row that has
    one token alone both are exactly 0 there.
    """
    origin = stats.logsumexp / nats_per_unit(spec)
    teacher_origin = (stats.teacher_logsumexp - stats.center) / nats_per_unit(spec)
    high, teacher_high = origin.to(y.dtype), teacher_origin.to(y.dtype)
    low = ((origin - high) - (teacher_origin - teacher_high)).to(y.dtype)
    torch.sub(torch.sub(z, high, out=work), y.sub_(teacher_high), out=y).sub_(low).mul_(bits_per_unit(spec, y.dtype))


def _divergence_gradient(
    p: Tensor, y: Tensor, stats: DivergenceStats, spec: RowSpec, q: Tensor, work: Tensor, out: Tensor
) -> None:
    """dD/dz up to ``slope_of_bits``, from p and the teacher's units; for reverse_kl from ``_to_log_ratio_``."""
    if spec.divergence == "reverse_kl":
        torch.mul(p, y, out=out)
        return
    normalize_(y, stats.teacher_logsumexp, spec)
    torch.exp2(y, out=q)
    if spec.divergence == "jsd":
        log_ratio_to_mixture(p, q, spec, mixture=work, out=out)
        out.mul_(p)
    divergence_gradient(out, p, q, (stats.center / NATS).to(p.dtype), spec, out=out)


def _sums(
    units: Tensor, gap: Tensor | None, origin: Tensor | None, target: Tensor, e: Tensor, work: Tensor, by: float
) -> ModelSums:
    """The sums over units of ``by`` bits, which end up relative to their maximum; ``gap`` is relative to ``origin``.

    ``work`` may be ``e`` where there is no gap. A logit is rounded once more only after its row's maximum is off.
    """
    maximum = units.amax(1, keepdim=True)
    units.sub_(maximum)
    total = torch.mul(units, by, out=e).exp2_().sum(1)
    weighted = dot(e, units, out=units).squeeze(1)
    gaps = torch.zeros_like(total)
    if gap is not None and origin is not None:
        gaps = dot(torch.sub(gap, origin, out=work), e, out=work).squeeze(1)
    return ModelSums(maximum.squeeze(1), total, weighted, gaps, target)


def _concatenate(parts: tuple[ModelSums, ...] | list[ModelSums]) -> ModelSums:
    columns = zip(*parts, strict=True)
    return ModelSums._make(None if column[0] is None else torch.cat(column) for column in columns)


def _inside(ids: Tensor, z: Tensor) -> Tensor:
    return (ids >= 0) & (ids < z.shape[1])


def _at(z: Tensor, ids: Tensor) -> Tensor:
    """The values at ``ids`` ``[n, K]``; LOWEST for those of other slices."""
    return z.gather(1, ids.clamp(0, z.shape[1] - 1)).masked_fill(~_inside(ids, z), LOWEST)
