"""What a pass over a part of a row leaves, how the parts of a row combine, and what it all means.

Vocabulary shards, tiles, and a support with its complement are all parts of a row; ``merge`` is the one rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from srpo_kernels.checks import refuse_name
from srpo_kernels.rows import DivergenceStats, Dlogits, RowGradients, RowSpec, RowStats, Scratch
from srpo_kernels.types import wide_dtype


class ModelSums(NamedTuple):
    """A part of a row of one model: ``maximum`` unit, and sums of ``e = exp(slope * x)`` with ``x = unit - maximum``.

    A unit is what a backend counts logits in: one is ``slope`` nats.

    ``total`` is of e, ``weighted`` of e x. ``target`` is the unit of the target where it is in this part, else below
    any logit. Of two models side by side, ``anchor`` is the other one's unit where this one's maximum is, and ``gap``
    the sum of e times the student's unit minus the teacher's, less that difference at the maximum; of a model alone
    they are None and 0.

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
    def unpack(cls, sums: Tensor) -> ModelSums:
        """The fields of ``[..., 5]``, or with an anchor ``[..., 6]``, as the kernels write them."""
        return cls(*sums.unbind(-1))

    @classmethod
    def of_support(cls, units: Tensor, slope: float) -> ModelSums:
        """The sums over K units ``[n, K]``."""
        maximum = units.amax(1)
        x = units - maximum[:, None]
        e = torch.exp(slope * x)
        return cls(maximum, e.sum(1), (e * x).sum(1), torch.zeros_like(maximum), maximum)

    def pack(self) -> Tensor:
        """The opposite of ``unpack``."""
        return torch.stack([x for x in self if x is not None], dim=-1)

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
    merged = []
    # The gap is the student's unit minus the teacher's: its sign in the teacher's anchor is the other one.
    for model, sign in zip(parts, (1.0, -1.0), strict=False):
        maximum, first = model.maximum.max(0)
        shift = model.maximum - maximum
        decay = torch.exp(slope * shift)
        total = model.total * decay
        weighted = (model.weighted + shift * model.total) * decay
        gap, anchor = model.gap * decay, None
        if model.anchor is not None:
            anchor = model.anchor.gather(0, first[None]).squeeze(0)
            gap = (model.gap + sign * (shift - (model.anchor - anchor)) * model.total) * decay
        merged.append(ModelSums(maximum, total.sum(0), weighted.sum(0), gap.sum(0), model.target.amax(0), anchor))
    return merged


# From a part's sums of one or both models, and the slope, to the whole row's.
Combine = Callable[[list[ModelSums], float], list[ModelSums]]


def divergences(student: ModelSums, teacher: ModelSums, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    """``KL(q || p)`` and ``KL(p || q)`` of student p and teacher q in nats, and p's mean of ``z - y``, wide, in nats.

    Rounding can take neither divergence below 0.
    """
    assert student.anchor is not None
    assert teacher.anchor is not None
    # The logarithm of the ratio, not the difference of logarithms: of models that are nearly equal it is nearly 0.
    log_totals = (student.total / teacher.total).log()
    own, others = student.gap / student.total, teacher.gap / teacher.total
    forward_kl = slope * ((student.maximum - teacher.anchor) - others) + log_totals
    reverse_kl = slope * ((teacher.maximum - student.anchor) + own) - log_totals
    wide = wide_dtype(own.device)
    mean_gap = slope * ((student.maximum - student.anchor).to(wide) + own.to(wide))
    return forward_kl.clamp_min(0.0), reverse_kl.clamp_min(0.0), mean_gap


def finish_row(sums: ModelSums, slope: float, *, entropy: bool) -> RowStats:
    """What the sums of a row say."""
    lse = sums.logsumexp(slope)[:, None]
    return RowStats(sums.log_probs(slope), lse, sums.entropy(slope) if entropy else None, None, None, None)


def finish_divergence(
    student: ModelSums, teacher: ModelSums, spec: RowSpec, slope: float, *, entropy: bool
) -> DivergenceStats:
    """What both models' sums say; jsd takes a pass of its own over the logits, its divergence is reverse_kl here."""
    forward_kl, reverse_kl, mean_gap = divergences(student, teacher, slope)
    match spec.divergence:
        case "forward_kl":
            divergence, center = forward_kl, torch.zeros_like(mean_gap)
        case "reverse_kl" | "jsd":
            divergence, center = reverse_kl, mean_gap
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
