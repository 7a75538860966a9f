"""Divergences whose entries are bounded, or that each row has of its own: one family, five numbers per row."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from srpo_kernels.checks import refuse_name
from srpo_kernels.rows.dtypes import wide_dtype
from srpo_kernels.rows.mixture import Divergence, has_mixture, mixture_of


class EntryDivergence(NamedTuple):
    """``D = sum_v min(f_v, clip)``, ``f = student_weight p log(p / m) + teacher_weight q log(q / m)``.

    ``m = student_share p + teacher_share q``; all are ``[n, 1]`` in a wide dtype, ``clip`` may be infinite. The
    gradient is ``dD/dz_v = g_v - p_v sum(g)``, with ``g = student_weight p log(p / m) + overlap p q / m`` at entries
    below the clip, and 0 at the others. A share may be 0: KL(q || p) has m = p.
    """

    student_weight: Tensor
    teacher_weight: Tensor
    student_share: Tensor
    teacher_share: Tensor
    clip: Tensor

    @classmethod
    def of(
        cls, divergence: Divergence, alpha: Tensor | float, clip: Tensor | float | None, rows: Tensor
    ) -> EntryDivergence:
        """That of a divergence by name, with an ``alpha`` and a ``clip`` ``[n]``, or one number for all ``rows``.

        An ``alpha`` of 0 or 1 makes a jsd the KL that its gradient, over the weight, tends to: forward_kl at 0,
        reverse_kl at 1, as ``SRPOConfig.from_alpha`` has it.
        """
        ones = torch.ones(len(rows), 1, dtype=wide_dtype(rows.device), device=rows.device)

        def column(value: Tensor | float) -> Tensor:
            return value.to(ones).view(-1, 1) if isinstance(value, Tensor) else ones * value

        a, bound, zeros = column(alpha), column(math.inf if clip is None else clip), ones * 0.0
        if has_mixture(divergence):
            # Plain arithmetic, of tensors as of numbers.
            mixture = mixture_of(divergence, cast(Any, a))
            numbers = [
                column(x)
                for x in (mixture.student_weight, mixture.teacher_weight, mixture.student_share, mixture.teacher_share)
            ]
            if divergence == "jsd":
                # At the ends the one weight that is not 0 is that of the model which is m itself.
                end = (a == 0.0) | (a == 1.0)
                numbers[:2] = torch.where(end, numbers[1], numbers[0]), torch.where(end, numbers[0], numbers[1])
            return cls._make([*numbers, bound])
        match divergence:
            case "forward_kl":
                return cls(zeros, ones, ones, zeros, bound)
            case "reverse_kl":
                return cls(ones, zeros, zeros, ones, bound)
            case unknown:
                refuse_name("divergence", unknown)

    @property
    def least(self) -> Tensor:
        """What D cannot be below, ``[n]``: 0 without a clip, with which entries below 0 may prevail."""
        return torch.where(self.clip.isinf(), 0.0, -math.inf).squeeze(1)

    def select(self, rows: Tensor | slice) -> EntryDivergence:
        """That of some rows."""
        return EntryDivergence._make(x[rows] for x in self)

    def numbers(self) -> EntryNumbers:
        """What a pass reads, by the model with the larger share in m."""
        of_student = self.student_share >= self.teacher_share
        major = torch.where(of_student, self.student_share, self.teacher_share)
        minor = torch.where(of_student, self.teacher_share, self.student_share)
        zeros = torch.zeros_like(major)
        return EntryNumbers(
            of_student,
            major.log2(),
            (minor / major).log2(),
            torch.where(of_student, self.student_weight, self.teacher_weight),
            torch.where(of_student, self.teacher_weight, self.student_weight),
            torch.where(of_student, self.student_weight, zeros),
            torch.where(of_student, zeros, self.student_weight),
            self.student_weight * self.teacher_share - self.teacher_weight * self.student_share,
            self.clip,
        )


class EntryNumbers(NamedTuple):
    """``EntryDivergence`` by its major model, the one with the larger share in m, and the minor one; ``[n, 1]`` each.

    Logarithms of ratios to m are relative to the major model's probability, of which m is at least half: exact for a
    model that has no share, finite where a probability underflows.
    """

    of_student: Tensor
    log2_share: Tensor
    log2_shares_ratio: Tensor
    major_weight: Tensor
    minor_weight: Tensor
    major_in_gradient: Tensor
    minor_in_gradient: Tensor
    overlap: Tensor
    clip: Tensor
