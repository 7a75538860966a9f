"""The passes over a slice of the vocabulary in torch: every device, every floating dtype.

Unlike the passes over whole rows they leave the logits as they are until the gradient, for their results are worth
nothing before the other slices' are there. A unit is a raw logit, or the tanh of one with a softcap.
"""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_kernels.rows import Dlogits, RowSpec, RowStats, support_coefficients
from srpo_kernels.rows_torch import (
    NATS,
    _blocks,
    _dot,
    _log_ratio_to_mixture,
    _normalize_,
    _unit_,
    bits_per_unit,
    nats_per_unit,
    scratch,
    slice_gradient_,
)
from srpo_kernels.sums import LOWEST, ModelSums

__all__ = [
    "finish_jsd",
    "jsd_sums",
    "log_prob_gradient_",
    "model_sums",
    "scratch",
    "slice_gradient_",
    "slope",
    "support_sums",
]


def slope(spec: RowSpec) -> float:
    """Nats per raw logit, or per tanh of one."""
    return nats_per_unit(spec)


def model_sums(logits: Tensor, teacher_logits: Tensor | None, spec: RowSpec, *, target_ids: Tensor) -> list[ModelSums]:
    """One pass over one or both models' logits, in copies of a few rows."""
    parts, by = [], bits_per_unit(spec, logits.dtype)
    for rows, (z, e, *pair) in _blocks(logits, 2 if teacher_logits is None else 5, buffers=2):
        _unit_(z.copy_(logits[rows]), spec)
        target = _at(z, target_ids[rows, None]).squeeze(1)
        z_max = _relative_(z)
        if teacher_logits is None:
            parts.append([_sums(z_max, z, None, target, e, e, by)])
            continue
        y, gap, work = pair
        _unit_(y.copy_(teacher_logits[rows]), spec)
        y_max = _relative_(y)
        torch.sub(z, y, out=gap)
        nowhere = torch.full_like(target, LOWEST)
        parts.append([_sums(z_max, z, gap, target, e, work, by), _sums(y_max, y, gap, nowhere, e, work, by)])
    return [_concatenate(model) for model in zip(*parts, strict=True)]


def support_sums(logits: Tensor, spec: RowSpec, *, target_ids: Tensor, support_ids: Tensor) -> tuple[ModelSums, Tensor]:
    """The support is taken out of copies of a few rows."""
    parts, support, by = [], [], bits_per_unit(spec, logits.dtype)
    for rows, (z, e) in _blocks(logits, 2, buffers=1):
        _unit_(z.copy_(logits[rows]), spec)
        ids = support_ids[rows]
        target = _at(z, target_ids[rows, None]).squeeze(1)
        support.append(_at(z, ids))
        row, k = _inside(ids, z).nonzero(as_tuple=True)
        z[row, ids[row, k]] = LOWEST
        parts.append(_sums(_relative_(z), z, None, target, e, e, by))
    return _concatenate(parts), torch.cat(support)


def jsd_sums(
    student_logits: Tensor, teacher_logits: Tensor, logsumexp: Tensor, teacher_logsumexp: Tensor, spec: RowSpec
) -> Tensor:
    """In bits, from probabilities that are good to the last digits."""
    parts = []
    for rows, (p, q, mixture, ratio) in _blocks(student_logits, 4, buffers=2):
        for out, logits, lse in ((p, student_logits, logsumexp), (q, teacher_logits, teacher_logsumexp)):
            _normalize_(out.copy_(logits[rows]), lse[rows], spec)
            out.exp2_()
        _log_ratio_to_mixture(p, q, spec, mixture=mixture, out=ratio)
        kl = _dot(p, ratio, out=ratio)
        torch.div(q, mixture, out=ratio).log2_()
        parts.append(torch.cat([kl, _dot(q, ratio, out=ratio)], dim=1))
    return torch.cat(parts)


def finish_jsd(sums: Tensor, logsumexp: Tensor, teacher_logsumexp: Tensor) -> tuple[Tensor, Tensor]:
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
    total, outside = support_coefficients(grad_log_probs, grad_tail, stats.log_tail)
    at_ids = grad_log_probs - total[:, None] * log_probs.exp()
    for rows, (p, *slopes) in _blocks(logits, 1 if spec.softcap is None else 2, buffers=1):
        z = logits[rows]
        _normalize_(z, stats.logsumexp[rows], spec, *slopes)
        torch.exp2(z, out=p)
        if grad_entropy is not None and stats.entropy is not None:
            z.add_(stats.entropy[rows, None] / NATS).mul_(p).mul_(-NATS * grad_entropy[rows, None])
        else:
            z.zero_()
        p.mul_(outside[rows, None])
        row, k = _inside(ids[rows], z).nonzero(as_tuple=True)
        p[row, ids[rows][row, k]] = at_ids[rows][row, k]
        torch.mul(z.add_(p), *slopes or (spec.scale,), out=z)
    return Dlogits(logits.to(dtype), None)


def _sums(
    maximum: Tensor, x: Tensor, gap: Tensor | None, target: Tensor, e: Tensor, work: Tensor, by: float
) -> ModelSums:
    """The sums over units ``x`` of ``by`` bits relative to their maximum; ``work`` may be ``e`` where there is no gap.

    Units, not bits: a logit is rounded once more only after its row's maximum is off.
    """
    total = torch.mul(x, by, out=e).exp2_().sum(1)
    weighted = _dot(e, x, out=work).squeeze(1)
    gaps = torch.zeros_like(total) if gap is None else _dot(e, gap, out=work).squeeze(1)
    return ModelSums(maximum, total, weighted, gaps, target)


def _concatenate(parts: tuple[ModelSums, ...] | list[ModelSums]) -> ModelSums:
    return ModelSums._make(map(torch.cat, zip(*parts, strict=True)))


def _relative_(z: Tensor) -> Tensor:
    """Take each row's maximum from it; returns the maxima ``[n]``."""
    maximum = z.amax(1, keepdim=True)
    z.sub_(maximum)
    return maximum.squeeze(1)


def _inside(ids: Tensor, z: Tensor) -> Tensor:
    return (ids >= 0) & (ids < z.shape[1])


def _at(z: Tensor, ids: Tensor) -> Tensor:
    """The values at ``ids`` ``[n, K]``; LOWEST for those of other slices."""
    return z.gather(1, ids.clamp(0, z.shape[1] - 1)).masked_fill(~_inside(ids, z), LOWEST)
