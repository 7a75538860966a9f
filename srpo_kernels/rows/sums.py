"""What a pass over a part of a row leaves, how the parts of a row combine, and what it all means.

Vocabulary shards, tiles, and a support with its complement are all parts of a row; ``merge`` is the one rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from srpo_kernels.checks import refuse_name
from srpo_kernels.rows.contract import DivergenceStats, Dlogits, RowGradients, RowSpec, RowStats, Scratch
from srpo_kernels.rows.dtypes import wide_dtype


class ModelSums(NamedTuple):
    """A part of a row of one model: ``maximum`` unit, and sums of ``e = exp(slope * x)`` with ``x = unit - maximum``.

    A unit is what a backend counts logits in: one is ``slope`` nats.

    ``total`` is of e, ``weighted`` of e x. ``target`` is the unit of the target where it is in this part, else below
    any logit. Of two models side by side, ``gap`` is the sum of e times the student's unit minus the teacher's: the
    student's less that difference where its own maximum is, the teacher's less that of both maxima. The teacher's unit
    where the student's maximum is, is the student's ``anchor``. For a model alone the gap is 0.

    Sums are relative to the maximum because most rows of a language model have hardly anything beside it: what is left
    would be lost to the rounding of the logits themselves.
    """

    maximum: Tensor
    total: Tensor
    weighted: Tensor
    gap: Tensor
    target: Tensor
    anchor: Tensor | None = None

    @classmethod
    def unpack(cls, sums: Tensor) -> list[ModelSums]:
        """Of ``[..., 5]`` for a model alone, of ``[..., 11]`` for student and teacher, as the kernels write them."""
        first, *second = sums.split([5] if sums.shape[-1] == 5 else [6, 5], dim=-1)
        return [cls(*first.unbind(-1)), *(cls(*x.unbind(-1)) for x in second)]

    @staticmethod
    def pack(models: Sequence[ModelSums]) -> Tensor:
        """The opposite of ``unpack``."""
        return torch.stack([x for model in models for x in model if x is not None], dim=-1)

    @classmethod
    def of_support(cls, units: Tensor, slope: float) -> ModelSums:
        """The sums over K units ``[n, K]``."""
        maximum = units.amax(1)
        x = units - maximum[:, None]
        e = torch.exp(slope * x)
        return cls(maximum, e.sum(1), (e * x).sum(1), torch.zeros_like(maximum), maximum)

    def logsumexp(self, slope: float) -> Tensor:
        """In nats, in the widest dtype: in fp32 it would be rounded like a logit."""
        wide = wide_dtype(self.maximum.device)
        return slope * self.maximum.to(wide) + self.total.to(wide).log()

    def log_probs(self, slope: float) -> Tensor:
        """The target's, in nats."""
        return (slope * (self.target - self.maximum) - self.total.log()).clamp_max(0.0)

    def entropy(self, slope: float) -> Tensor:
        """In nats."""
        return (self.total.log() - slope * self.weighted / self.total).clamp_min(0.0)


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


# From a part's sums of one or both models, and the slope, to the whole row's.
Combine = Callable[[list[ModelSums], float], list[ModelSums]]


def divergences(student: ModelSums, teacher: ModelSums, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    """``KL(q || p)`` and ``KL(p || q)`` of student p and teacher q, in nats, and the latter once more in a wide dtype.

    Rounding can take the first two below 0, where they stop; the third is what a gradient subtracts.
    """
    assert student.anchor is not None
    # The logarithm of the ratio, not the difference of logarithms: of models that are nearly equal it is nearly 0.
    log_totals = (student.total / teacher.total).log()
    own = student.gap / student.total
    forward_kl = log_totals - slope * teacher.gap / teacher.total
    reverse_kl = slope * ((teacher.maximum - student.anchor) + own) - log_totals
    wide = wide_dtype(own.device)
    mean_gap = slope * (student.maximum.to(wide) - student.anchor.to(wide) + own.to(wide))
    center = mean_gap - (student.logsumexp(slope) - teacher.logsumexp(slope))
    return forward_kl.clamp_min(0.0), reverse_kl.clamp_min(0.0), center


def finish_row(sums: ModelSums, slope: float, *, entropy: bool) -> RowStats:
    """What the sums of a row say."""
    lse = sums.logsumexp(slope)[:, None]
    return RowStats(sums.log_probs(slope), lse, sums.entropy(slope) if entropy else None, None, None, None)


def finish_divergence(
    student: ModelSums, teacher: ModelSums, spec: RowSpec, slope: float, *, entropy: bool
) -> DivergenceStats:
    """What both models' sums say; jsd takes a pass of its own over the logits, its divergence is reverse_kl here."""
    forward_kl, reverse_kl, wide_reverse_kl = divergences(student, teacher, slope)
    match spec.divergence:
        case "forward_kl":
            divergence, center = forward_kl, torch.zeros_like(wide_reverse_kl)
        case "reverse_kl" | "jsd":
            divergence, center = reverse_kl, wide_reverse_kl
        case unknown:
            refuse_name("divergence", unknown)
    return DivergenceStats(
        student.log_probs(slope),
        student.logsumexp(slope)[:, None],
        student.entropy(slope) if entropy else None,
        teacher.logsumexp(slope)[:, None],
        teacher.entropy(slope),
        divergence,
        center[:, None],
    )


def finish_support(
    complement: ModelSums, units: Tensor, ids: Tensor, spec: RowSpec, slope: float, *, entropy: bool
) -> RowStats:
    """What the ``units`` ``[n, K]`` of the support ``ids`` and the sums of the rest of the row say.

    ``complement.target`` is the row's target, in the support or not. The tail is a sum of its own: 1 - sum(support)
    would lose a small one to rounding.
    """
    pairs = zip(complement[:5], ModelSums.of_support(units, slope)[:5], strict=True)
    (sums,) = merge([ModelSums(*map(torch.stack, pairs))], slope)
    stats = finish_row(sums._replace(target=complement.target), slope, entropy=entropy)
    log_probs = slope * (units - sums.maximum[:, None]) - sums.total.log()[:, None]
    tail_logsumexp = complement.logsumexp(slope)[:, None] if spec.add_tail else None
    return stats._replace(support_ids=ids, support_log_probs=log_probs, tail_logsumexp=tail_logsumexp)


class SlicePasses(Protocol):
    """What a backend implements for a slice of the vocabulary: logits ``[n, V_r]``, ids relative to its first one.

    Ids outside of ``[0, V_r)`` are another slice's. The statistics' passes leave the logits as they are, and the
    gradients' passes find them so.
    """

    def scratch(self, vocab_size: int, device: torch.device) -> Scratch:
        """What a pass allocates beside its arguments."""

    def slope(self, spec: RowSpec) -> float:
        """Nats per unit."""

    def model_sums(
        self, logits: Tensor, teacher_logits: Tensor | None, spec: RowSpec, *, target_ids: Tensor
    ) -> list[ModelSums]:
        """The sums of the student and, where there is one, of the teacher."""

    def support_sums(
        self, logits: Tensor, spec: RowSpec, *, target_ids: Tensor, support_ids: Tensor
    ) -> tuple[ModelSums, Tensor]:
        """The sums of the slice without the support ``[n, K]``, and the support's units, LOWEST in other slices."""

    def jsd_sums(
        self, student_logits: Tensor, teacher_logits: Tensor, logsumexp: Tensor, teacher_logsumexp: Tensor,
        spec: RowSpec,
    ) -> Tensor:  # fmt: skip
        """The slice's part of ``KL(p || m)`` and ``KL(q || m)``, ``[n, 2]``: parts add up."""

    def finish_jsd(
        self, sums: Tensor, logsumexp: Tensor, teacher_logsumexp: Tensor, spec: RowSpec
    ) -> tuple[Tensor, Tensor]:
        """``KL(p || m)`` and ``KL(q || m)`` in nats, ``[n]``, from the sums over all slices."""

    def log_prob_gradient_(
        self,
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
        """``RowPasses.log_prob_gradient_`` of the slice, from its logits."""

    def gradient_(
        self,
        logits: Tensor,
        teacher_logits: Tensor | None,
        stats: RowStats | DivergenceStats,
        grads: RowGradients,
        spec: RowSpec,
        *,
        target_ids: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """Turn the slice's logits into dlogits, all terms at once."""
