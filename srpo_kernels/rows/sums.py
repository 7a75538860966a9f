"""How the parts of a row combine, and what their sums mean.

Vocabulary shards, tiles, and a support with its complement are all parts of a row; ``merge`` is the one rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from srpo_kernels.rows.contract import ModelSums, Statistics
from srpo_kernels.rows.dtypes import wide_dtype
from srpo_kernels.rows.spec import LOWEST, RowSpec

# From a part's sums of one or both models, and the slope, to the whole row's.
Combine = Callable[[list[ModelSums], float], list[ModelSums]]


def unpack(sums: Tensor) -> list[ModelSums]:
    """Of ``[..., 5]`` for a model alone, of ``[..., 11]`` for student and teacher, as the kernels write them."""
    first, *second = sums.split([5] if sums.shape[-1] == 5 else [6, 5], dim=-1)
    return [ModelSums(*first.unbind(-1)), *(ModelSums(*x.unbind(-1)) for x in second)]


def pack(models: Sequence[ModelSums]) -> Tensor:
    """The opposite of ``unpack``."""
    return torch.stack([x for model in models for x in model if x is not None], dim=-1)


def support_sums(units: Tensor, slope: float) -> ModelSums:
    """The sums over K units ``[n, K]``."""
    maximum = units.amax(1)
    x = units - maximum[:, None]
    e = torch.exp(slope * x)
    return ModelSums(maximum, e.sum(1), (e * x).sum(1), torch.zeros_like(maximum), maximum)


def merge(parts: Sequence[ModelSums], slope: float) -> list[ModelSums]:
    """The sums of whole rows, of one model or of student and teacher, from parts that lie along dimension 0."""
    maxima, places = zip(*(model.maximum.max(0) for model in parts), strict=True)
    shifts = [model.maximum - maximum for model, maximum in zip(parts, maxima, strict=True)]
    merged = []
    for model, maximum, place, shift in zip(parts, maxima, places, shifts, strict=True):
        anchor, gap_shift = None, shifts[0] - shift
        if model.anchor is not None:
            anchor = model.anchor.gather(0, place[None]).squeeze(0)
            gap_shift = shift - (model.anchor - anchor)
        decay = torch.exp(slope * shift)
        weighted = (model.weighted + shift * model.total) * decay
        gap = (model.gap + gap_shift * model.total) * decay
        total = model.total * decay
        merged.append(ModelSums(maximum, total.sum(0), weighted.sum(0), gap.sum(0), model.target.amax(0), anchor))
    return merged


def logsumexp(sums: ModelSums, slope: float) -> Tensor:
    """In nats, ``[n, 1]``, in the widest dtype: in fp32 it would be rounded like a logit."""
    wide = wide_dtype(sums.maximum.device)
    return (slope * sums.maximum.to(wide) + sums.total.to(wide).log())[:, None]


# In nats: entries of a divergence are of log-probs, and fp64 rounds a log-sum-exp of this size at 1e-7.
_LARGEST_LOGSUMEXP = 2.0**30


def row_statistics(sums: ModelSums, slope: float, *, entropy: bool) -> Statistics:
    """What the sums of a row say."""
    log_total = sums.total.log()
    log_probs = (slope * (sums.target - sums.maximum) - log_total).clamp_max(0.0)
    entropies = (log_total - slope * sums.weighted / sums.total).clamp_min(0.0) if entropy else None
    return Statistics(log_probs, logsumexp(sums, slope), entropies)


def pair_statistics(
    student: ModelSums, teacher: ModelSums, spec: RowSpec, slope: float, *, entropy: bool
) -> Statistics:
    """What both models' sums say; a divergence that is no KL takes a look of its own at the logits and is left out."""
    stats = row_statistics(student, slope, entropy=entropy)
    stats = stats.with_teacher(row_statistics(teacher, slope, entropy=True))
    if not spec.all_kls:
        return stats
    assert student.anchor is not None
    # The logarithm of the ratio, not the difference of logarithms: of models that are nearly equal it is nearly 0.
    log_totals = (student.total / teacher.total).log()
    # Rounding can take a KL below 0; the mean log-ratio, which a gradient subtracts, stays as it is.
    if "forward_kl" in spec.all_kls:
        forward_kl = log_totals - slope * teacher.gap / teacher.total
        stats = stats._replace(forward_kl=forward_kl.clamp_min(0.0))
    if "reverse_kl" in spec.all_kls:
        own = student.gap / student.total
        reverse_kl = slope * ((teacher.maximum - student.anchor) + own) - log_totals
        wide = stats.logsumexp.dtype
        mean_gap = slope * (student.maximum.to(wide) - student.anchor.to(wide) + own.to(wide))
        mean_log_ratio = mean_gap[:, None] - (stats.logsumexp - logsumexp(teacher, slope))
        stats = stats._replace(reverse_kl=reverse_kl.clamp_min(0.0), mean_log_ratio=mean_log_ratio)
    return stats if spec.kl is None else stats._replace(divergence=getattr(stats, spec.kl))


def with_divergence_sums(stats: Statistics, sums: Tensor, spec: RowSpec) -> Statistics:
    """These with a divergence that is no KL, of its sums ``[n, 2]``."""
    if spec.entries is not None:
        assert stats.teacher_logsumexp is not None
        sizes = torch.maximum(stats.logsumexp.abs(), stats.teacher_logsumexp.abs())
        sums = sums.masked_fill(sizes > _LARGEST_LOGSUMEXP, math.nan)
    center, divergence = sums.split(1, dim=1)
    # Rounding can take it below 0; one whose entries are bounded from above may be there by itself.
    divergence = divergence.squeeze(1)
    least = torch.zeros_like(divergence) if spec.entries is None else spec.entries.least.to(divergence)
    divergence = torch.maximum(divergence, least)
    return stats._replace(divergence=divergence, center=center.to(stats.logsumexp.dtype))


def given_statistics(log_probs: Tensor, spec: RowSpec) -> Statistics:
    """What the log-probs of a teacher's likeliest tokens say of it: its entropy is at least that of their buckets."""
    rest = (1.0 - log_probs.exp().sum(1)).clamp_min(torch.finfo(log_probs.dtype).tiny)
    nothing = log_probs.new_zeros(len(log_probs))
    column = nothing.to(wide_dtype(log_probs.device))[:, None]
    return Statistics(
        nothing,
        column,
        bucket_entropy(log_probs),
        support_log_probs=log_probs,
        tail_logsumexp=column + rest.log()[:, None] if spec.add_tail else None,
    )


def bucket_entropy(log_probs: Tensor) -> Tensor:
    """Of tokens ``[..., K]`` and one bucket for all others, in nats: what their row's entropy is at least."""
    p = log_probs.exp()
    rest = (1.0 - p.sum(-1)).clamp_min(0.0)
    return -(torch.xlogy(rest, rest) + (p * log_probs).sum(-1)).clamp_max(0.0)


def support_statistics(
    complement: ModelSums, units: Tensor, ids: Tensor, spec: RowSpec, slope: float, *, entropy: bool
) -> Statistics:
    """What the ``units`` ``[n, K]`` of the support ``ids`` and the sums of the rest of the row say.

    ``complement.target`` is the row's target, in the support or not. The tail is a sum of its own: 1 - sum(support)
    would lose a small one to rounding.
    """
    pairs = zip(complement[:5], support_sums(units, slope)[:5], strict=True)
    (sums,) = merge([ModelSums(*map(torch.stack, pairs))], slope)
    stats = row_statistics(sums._replace(target=complement.target), slope, entropy=entropy)
    # A token that is excluded, or is none, stays where a factor before it is no infinity.
    log_probs = (slope * (units - sums.maximum[:, None]) - sums.total.log()[:, None]).clamp_min(LOWEST)
    tail_logsumexp = logsumexp(complement, slope) if spec.add_tail else None
    return stats._replace(support_ids=ids, support_log_probs=log_probs, tail_logsumexp=tail_logsumexp)
