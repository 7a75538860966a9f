"""What the kernels leave of a row, how parts of a row combine, and what it all means.

Vocabulary slices, tiles and a support with its complement are all parts of a row; ``merge`` is the one rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from srpo_kernels.rows import DivergenceStats, RowSpec, RowStats
from srpo_kernels.types import wide_dtype


class Transform(NamedTuple):
    """The logit transform in two numbers: a logit in base 2 is ``slope2 * unit``, with ``unit = tanh(inner * raw)``.

    Without a softcap the unit is the raw logit.
    """

    inner: float
    slope2: float
    softcap: bool

    @classmethod
    def of(cls, spec: RowSpec) -> Transform:
        """The transform of ``spec``."""
        if spec.softcap is None:
            return cls(0.0, _fp32(spec.scale / math.log(2.0)), False)
        return cls(spec.logit_scale / spec.softcap, _fp32(spec.softcap / spec.temperature / math.log(2.0)), True)

    @property
    def slope(self) -> float:
        """A logit per unit, in nats."""
        return self.slope2 * math.log(2.0)

    def units(self, raw: Tensor) -> Tensor:
        """Units of raw logits."""
        return torch.tanh(raw * self.inner) if self.softcap else raw


def _fp32(x: float) -> float:
    """As a kernel sees it: what is computed on both sides must agree to the last digit."""
    return torch.tensor(x, dtype=torch.float32).item()


class ModelSums(NamedTuple):
    """A part of a row of one model: ``maximum`` unit, and sums of ``e = exp(slope * x)`` with ``x = unit - maximum``.

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
    def of_support(cls, units: Tensor, transform: Transform) -> ModelSums:
        """The sums over K units ``[n, K]``."""
        maximum = units.amax(1)
        x = units - maximum[:, None]
        e = torch.exp(transform.slope * x)
        return cls(maximum, e.sum(1), (e * x).sum(1), torch.zeros_like(maximum), maximum)

    def logsumexp(self, transform: Transform) -> Tensor:
        """In nats, in the widest dtype: in fp32 it would be rounded like a logit."""
        wide = wide_dtype(self.maximum.device)
        return transform.slope * self.maximum.to(wide) + self.total.to(wide).log()

    def log_probs(self, transform: Transform) -> Tensor:
        """The target's, in nats."""
        return transform.slope * (self.target - self.maximum) - self.total.log()

    def entropy(self, transform: Transform) -> Tensor:
        """In nats."""
        return self.total.log() - transform.slope * self.weighted / self.total


def merge(parts: Sequence[ModelSums], transform: Transform) -> list[ModelSums]:
    """The sums of whole rows, of one model or of student and teacher, from parts that lie along dimension 0."""
    maxima = [model.maximum.amax(0) for model in parts]
    shifts = [model.maximum - maximum for model, maximum in zip(parts, maxima, strict=True)]
    merged = []
    for model, maximum, shift in zip(parts, maxima, shifts, strict=True):
        decay = torch.exp(transform.slope * shift)
        weighted = (model.weighted + shift * model.total) * decay
        gap = (model.gap + (shifts[0] - shifts[-1]) * model.total) * decay
        total = model.total * decay
        merged.append(ModelSums(maximum, total.sum(0), weighted.sum(0), gap.sum(0), model.target.amax(0)))
    return merged


class Base2(NamedTuple):
    """A log-sum-exp in base 2, ``[n, 1]``: ``high`` is what a kernel takes, ``low`` what that lacks."""

    high: Tensor
    low: Tensor

    @classmethod
    def of(cls, logsumexp: Tensor, dtype: torch.dtype) -> Base2:
        """From nats in a wider dtype."""
        whole = logsumexp / math.log(2.0)
        high = whole.to(dtype)
        return cls(high, (whole - high).to(dtype))

    @property
    def correction(self) -> Tensor:
        """What turns a kernel's probability into the true one."""
        return torch.exp2(-self.low)


def divergences(student: ModelSums, teacher: ModelSums, transform: Transform) -> tuple[Tensor, Tensor]:
    """``KL(q || p)`` and ``KL(p || q)`` of student p and teacher q, in nats."""
    lse_gap = student.total.log() - teacher.total.log()
    forward_kl = lse_gap - transform.slope * teacher.gap / teacher.total
    reverse_kl = transform.slope * student.gap / student.total - lse_gap
    return forward_kl, reverse_kl


def finish_row(sums: ModelSums, transform: Transform, *, entropy: bool) -> RowStats:
    """What the sums of a row say."""
    lse = sums.logsumexp(transform)[:, None]
    return RowStats(sums.log_probs(transform), lse, sums.entropy(transform) if entropy else None, None, None, None)


def finish_divergence(
    student: ModelSums, teacher: ModelSums, spec: RowSpec, transform: Transform, *, entropy: bool
) -> DivergenceStats:
    """What both models' sums say; jsd takes a pass of its own over the logits, its divergence is reverse_kl here."""
    forward_kl, reverse_kl = divergences(student, teacher, transform)
    forward = spec.divergence == "forward_kl"
    return DivergenceStats(
        student.log_probs(transform),
        student.logsumexp(transform)[:, None],
        student.entropy(transform) if entropy else None,
        teacher.logsumexp(transform)[:, None],
        teacher.entropy(transform),
        forward_kl if forward else reverse_kl,
        (torch.zeros_like(forward_kl) if forward else reverse_kl)[:, None],
    )
