"""What a pass over a part of a row leaves, how the parts of a row combine, and what it all means.

Vocabulary shards, tiles, and a support with its complement are all parts of a row; ``merge`` is the one rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from srpo_kernels.rows import DivergenceStats, Dlogits, RowGradients, RowSpec, RowStats, Scratch
from srpo_kernels.types import wide_dtype

# Stands for minus infinity: 0 * LOWEST is 0. The unit of a logit that is taken out of its row, or in another part.
LOWEST = -1e30


class ModelSums(NamedTuple):
    """A part of a row of one model: ``maximum`` unit, and sums of ``e = exp(slope * x)`` with ``x = unit - maximum``.

    A unit is what a backend counts logits in: one is ``slope`` nats.

    ``total`` is of e, ``weighted`` of e x, ``gap`` of e times the student's x minus the teacher's (0 for a model
    alone). ``target`` is the unit of the target where it is in this part, else below any logit.

    Sums are relative to the maximum because most rows of a language model have hardly anything beside it: what is left
    would be lost to the rounding of the logits themselves.
    """

    maximum: Tensor
    total: Tensor
    weighted: Tensor
    gap: Tensor
    target: Tensor

    @classmethod
    def unpack(cls, sums: Tensor) -> ModelSums:
        """The fields of ``[..., 5]`` as the kernels write them."""
        return cls._make(sums.unbind(-1))

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
        return slope * (self.target - self.maximum) - self.total.log()

    def entropy(self, slope: float) -> Tensor:
        """In nats."""
        return self.total.log() - slope * self.weighted / self.total


def merge(parts: Sequence[ModelSums], slope: float) -> list[ModelSums]:
    """The sums of whole rows, of one model or of student and teacher, from parts that lie along dimension 0."""
    maxima = [model.maximum.amax(0) for model in parts]
    shifts = [model.maximum - maximum for model, maximum in zip(parts, maxima, strict=True)]
    merged = []
    for model, maximum, shift in zip(parts, maxima, shifts, strict=True):
        decay = torch.exp(slope * shift)
        weighted = (model.weighted + shift * model.total) * decay
        gap = (model.gap + (shifts[0] - shifts[-1]) * model.total) * decay
        total = model.total * decay
        merged.append(ModelSums(maximum, total.sum(0), weighted.sum(0), gap.sum(0), model.target.amax(0)))
    return merged


# From a part's sums of one or both models, and the slope, to the whole row's.
Combine = Callable[[list[ModelSums], float], list[ModelSums]]


def divergences(student: ModelSums, teacher: ModelSums, slope: float) -> tuple[Tensor, Tensor]:
    """``KL(q || p)`` and ``KL(p || q)`` of student p and teacher q, in nats."""
    lse_gap = student.total.log() - teacher.total.log()
    forward_kl = lse_gap - slope * teacher.gap / teacher.total
    reverse_kl = slope * student.gap / student.total - lse_gap
    return forward_kl, reverse_kl


def finish_row(sums: ModelSums, slope: float, *, entropy: bool) -> RowStats:
    """What the sums of a row say."""
    lse = sums.logsumexp(slope)[:, None]
    return RowStats(sums.log_probs(slope), lse, sums.entropy(slope) if entropy else None, None, None, None)


def finish_divergence(
    student: ModelSums, teacher: ModelSums, spec: RowSpec, slope: float, *, entropy: bool
) -> DivergenceStats:
    """What both models' sums say; jsd takes a pass of its own over the logits, its divergence is reverse_kl here."""
    forward_kl, reverse_kl = divergences(student, teacher, slope)
    forward = spec.divergence == "forward_kl"
    return DivergenceStats(
        student.log_probs(slope),
        student.logsumexp(slope)[:, None],
        student.entropy(slope) if entropy else None,
        teacher.logsumexp(slope)[:, None],
        teacher.entropy(slope),
        forward_kl if forward else reverse_kl,
        (torch.zeros_like(forward_kl) if forward else reverse_kl)[:, None],
    )


def finish_support(
    complement: ModelSums, units: Tensor, ids: Tensor, spec: RowSpec, slope: float, *, entropy: bool
) -> RowStats:
    """What the ``units`` ``[n, K]`` of the support ``ids`` and the sums of the rest of the row say.

    ``complement.target`` is the row's target, in the support or not. The tail is a sum of its own: 1 - sum(support)
    would lose a small one to rounding.
    """
    pairs = zip(complement, ModelSums.of_support(units, slope), strict=True)
    (sums,) = merge([ModelSums._make(map(torch.stack, pairs))], slope)
    stats = finish_row(sums._replace(target=complement.target), slope, entropy=entropy)
    log_probs = slope * (units - sums.maximum[:, None]) - sums.total.log()[:, None]
    log_tail = None
    if spec.add_tail:
        # The gradient divides by the tail.
        smallest = math.log(torch.finfo(units.dtype).tiny)
        log_tail = (complement.logsumexp(slope) - stats.logsumexp.squeeze(1)).to(units.dtype).clamp_min(smallest)
    return stats._replace(support_ids=ids, support_log_probs=log_probs, log_tail=log_tail)


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

    def finish_jsd(self, sums: Tensor, logsumexp: Tensor, teacher_logsumexp: Tensor) -> tuple[Tensor, Tensor]:
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

    def slice_gradient_(
        self,
        logits: Tensor,
        teacher_logits: Tensor | None,
        stats: RowStats | DivergenceStats,
        grads: RowGradients,
        spec: RowSpec,
        *,
        target_ids: Tensor,
        first_id: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """``RowPasses.slice_gradient_``."""
