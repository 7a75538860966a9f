"""Sums over rows of logits, or over a slice of the vocabulary, in torch; the logits stay as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_kernels.rows.contract import ModelSums, Statistics
from srpo_kernels.rows.spec import LOWEST, LogitTransform, RowSpec
from srpo_kernels.rows.torch_blocks import (
    NATS,
    argmax,
    bits_per_unit,
    blocks,
    dot,
    inside,
    nats_of_gradient,
    normalize_,
    to_units_,
)
from srpo_kernels.rows.torch_entries import entries, entry_numbers
from srpo_kernels.rows.torch_mixture import mixture_block


def sums(
    logits: Tensor,
    teacher_logits: Tensor | None,
    transform: LogitTransform,
    *,
    target_ids: Tensor,
    teacher_transform: LogitTransform | None = None,
) -> list[ModelSums]:
    """One pass over one or both models' logits, in copies of a few rows."""
    parts, by = [], bits_per_unit(transform, logits.dtype)
    for rows, (z, e, *pair) in blocks(logits, 2 if teacher_logits is None else 5, buffers=2):
        ids = target_ids[rows, None]
        to_units_(z.copy_(logits[rows]), transform)
        target = _at(z, ids).squeeze(1)
        if teacher_logits is None:
            parts.append([_sums(z, None, None, target, e, e, by)])
            continue
        y, gap, work = pair
        to_units_(y.copy_(teacher_logits[rows]), teacher_transform or transform)
        teacher_target = _at(y, ids).squeeze(1)
        likeliest = argmax(z)
        anchor, z_max, y_max = y.gather(1, likeliest), z.gather(1, likeliest), y.amax(1, keepdim=True)
        torch.sub(z, y, out=gap)
        student = _sums(z, gap, z_max - anchor, target, e, work, by)
        teacher = _sums(y, gap, z_max - y_max, teacher_target, e, work, by)
        parts.append([student._replace(anchor=anchor.squeeze(1)), teacher])
    return [_concatenate(model) for model in zip(*parts, strict=True)]


def units(logits: Tensor, transform: LogitTransform) -> Tensor:
    """In a copy."""
    copy = logits.clone()
    to_units_(copy, transform)
    return copy


def support_sums(
    logits: Tensor, transform: LogitTransform, *, target_ids: Tensor, support_ids: Tensor
) -> tuple[ModelSums, Tensor]:
    """The support is taken out of copies of a few rows."""
    parts, support, by = [], [], bits_per_unit(transform, logits.dtype)
    for rows, (z, e) in blocks(logits, 2, buffers=1):
        to_units_(z.copy_(logits[rows]), transform)
        ids = support_ids[rows]
        target = _at(z, target_ids[rows, None]).squeeze(1)
        support.append(_at(z, ids))
        row, k = inside(ids, z).nonzero(as_tuple=True)
        z[row, ids[row, k]] = LOWEST
        parts.append(_sums(z, None, None, target, e, e, by))
    return _concatenate(parts), torch.cat(support)


def divergence_sums(logits: Tensor, teacher_logits: Tensor, stats: Statistics, spec: RowSpec, *, first: bool) -> Tensor:
    """From probabilities that are good to the last digits: nothing is left to add for the row as a whole."""
    mixture = spec.mixture
    if mixture is None:
        return _entry_sums(logits, teacher_logits, stats, spec)
    assert stats.teacher_logsumexp is not None
    parts = []
    for rows, (p, q, work, ratio) in blocks(logits, 4, buffers=2):
        for out, z, lse, transform in (
            (p, logits, stats.logsumexp, spec.transform),
            (q, teacher_logits, stats.teacher_logsumexp, spec.teacher_transform),
        ):
            to_units_(out.copy_(z[rows]), transform)
            normalize_(out, lse[rows], spec)
            out.exp2_()
        center, *kls = mixture_block(p, q, mixture, work=work, out=ratio)
        divergence = mixture.divergence(*(None if kl is None else kl * NATS for kl in kls))
        parts.append(torch.cat([center * nats_of_gradient(spec), divergence], dim=1))
    return torch.cat(parts)


def _entry_sums(logits: Tensor, teacher_logits: Tensor, stats: Statistics, spec: RowSpec) -> Tensor:
    parts = []
    for rows, (z, y, *work) in blocks(logits, 5, buffers=2):
        to_units_(z.copy_(logits[rows]), spec.transform)
        to_units_(y.copy_(teacher_logits[rows]), spec.teacher_transform)
        f, g = entries(z, y, stats.select(rows), spec, entry_numbers(spec, rows, z.dtype), work)
        parts.append(torch.stack([g.sum(1), f.sum(1)], dim=1))
    return torch.cat(parts)


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


def _at(z: Tensor, ids: Tensor) -> Tensor:
    """The values at ``ids`` ``[n, K]``; LOWEST for those of other slices."""
    return z.gather(1, ids.clamp(0, z.shape[1] - 1)).masked_fill(~inside(ids, z), LOWEST)
