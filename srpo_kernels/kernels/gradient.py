"""The numbers of a row that its kernels read, from its statistics and coefficients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from srpo_kernels.kernels.launch import gradient_terms
from srpo_kernels.kernels.transform import Base2, Transform
from srpo_kernels.rows.contract import Coefficients, Statistics
from srpo_kernels.rows.dtypes import wide_dtype
from srpo_kernels.rows.mixture import Mixture
from srpo_kernels.rows.spec import LOWEST, RowSpec


def mixture_shares(models: Base2, mixture: Mixture) -> Tensor:
    """The models' shares in the mixture, ``[n, 2]`` and wide, for probabilities as the kernels see them."""
    return by_model(torch.exp2(-models.low.to(wide_dtype(models.low.device))), mixture)


def by_model(values: Tensor, mixture: Mixture) -> Tensor:
    """``values`` ``[n, 2]`` of student and teacher times their shares in the mixture, in place."""
    # A tensor of Python's numbers would be copied to the GPU, for which the host waits.
    values[:, 0].mul_(mixture.student_share)
    values[:, 1].mul_(mixture.teacher_share)
    return values


def entry_numbers(stats: Statistics, spec: RowSpec, dtype: torch.dtype, by: Tensor | float = 1.0) -> Tensor:
    """What ``row_entries`` reads, ``[n, 12]``; the gradient's entries times ``by`` ``[n, 1]``."""
    assert stats.teacher_logsumexp is not None and spec.entries is not None
    transform = Transform.of(spec.transform)
    origins = torch.cat([stats.logsumexp, stats.teacher_logsumexp], dim=1) / transform.slope
    high = origins.to(dtype)
    # What the kernel's log-probabilities lack, in bits.
    low, teacher_low = ((high - origins) * transform.slope2).split(1, dim=1)
    own = spec.entries.numbers()
    major, minor = torch.where(own.of_student, low, teacher_low), torch.where(own.of_student, teacher_low, low)
    by_major, by_minor = major.exp2() * math.log(2.0), minor.exp2() * math.log(2.0)
    numbers = [
        own.of_student,
        minor - major,
        own.log2_share,
        own.log2_shares_ratio,
        own.major_weight * by_major,
        own.minor_weight * by_minor,
        own.major_in_gradient * by_major * by,
        own.minor_in_gradient * by_minor * by,
        own.overlap * minor.exp2() * by,
        own.clip,
    ]
    return torch.cat([high, *(x.to(dtype) for x in numbers)], dim=1)


def gradient_numbers(stats: Statistics, coefficients: Coefficients, spec: RowSpec) -> tuple[dict[str, bool], Tensor]:
    """Which terms the gradient has, and the numbers of ``row_grad``, ``[n, ...]``."""
    _, _, outside, log_sum, by_log, by_forward, by_reverse, by_divergence = coefficients
    mixture = None if by_divergence is None else spec.mixture
    terms = gradient_terms(
        mixture,
        forward_kl=by_forward is not None,
        reverse_kl=by_reverse is not None,
        entries=by_divergence is not None and mixture is None,
    )
    dtype, transform = outside.dtype, Transform.of(spec.transform)
    if by_log is not None:
        assert stats.entropy is not None
        outside = outside + by_log * stats.entropy
    if log_sum is stats.tail_logsumexp:
        # If the tail is excluded tokens, it has no probability, and a log-sum-exp that fp32 is too coarse for.
        log_sum = log_sum.where(log_sum >= 0.5 * LOWEST * transform.slope, stats.logsumexp)
    models = Base2.of([log_sum] if stats.teacher_logsumexp is None else [log_sum, stats.teacher_logsumexp], dtype)
    # What the log-sum-exps lack in fp32 scales a row's probabilities and shifts its log-ratios.
    (student_low, *_), (correction, *_) = models.low.split(1, 1), models.correction.split(1, 1)
    by_p, scale = outside[:, None], spec.transform.scale * correction
    by_log2 = by_p_at_ids = missing = zero = torch.zeros_like(by_p)
    if by_log is not None:
        by_log2 = by_log[:, None] * math.log(2.0)
        by_p = by_p - by_log2 * student_low
    own: list[Tensor] = []
    if by_forward is not None:
        by = by_forward[:, None]
        by_p_at_ids = by
        own.append(by * (models.correction[:, 1:] / correction) * scale)
    if by_reverse is not None:
        assert stats.teacher_logsumexp is not None and stats.mean_log_ratio is not None
        # Each model's units less their log-sum-exp, the teacher's less the mean of the log-ratio as well: of a row that
        # has one token alone both are exactly 0 there.
        by = by_reverse[:, None] * transform.slope
        origins = torch.cat([log_sum, stats.teacher_logsumexp - stats.mean_log_ratio], dim=1) / transform.slope
        high = origins.to(dtype)
        low = origins - high
        missing = missing + by * (low[:, :1] - low[:, 1:]).to(dtype)
        own += [by * scale, high]
    if by_divergence is not None:
        assert stats.center is not None
        by = by_divergence[:, None]
        missing = missing + by * stats.center.to(dtype)
        if mixture is None:
            own.append(entry_numbers(stats, spec, dtype, by * spec.transform.scale))
        else:
            by_kl = by * (math.log(2.0) if terms["STUDENT_KL"] else 0.0)
            missing = missing + by_kl * student_low
            own.append(mixture_shares(models, mixture).to(dtype))
            own += [by_kl * scale] if terms["STUDENT_KL"] else []
            own += [by * mixture.ratio * models.correction[:, 1:] * scale] if terms["OVERLAP"] else []
    if missing is not zero or by_p_at_ids is not zero:
        by_p_at_ids = by_p_at_ids - missing
        by_p = by_p + by_p_at_ids
    factors = (x if x is zero else x * scale for x in (by_p, by_log2, by_p_at_ids))
    # Of a student alone, both are its own.
    high = models.high.expand(-1, 2)
    return terms, torch.cat([high, *factors, *own], dim=1)
