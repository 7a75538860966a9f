"""Divergences with a clip, or of each row's own, in torch, on blocks of a few rows."""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_kernels.rows.contract import Statistics
from srpo_kernels.rows.entries import EntryNumbers
from srpo_kernels.rows.spec import RowSpec
from srpo_kernels.rows.torch_blocks import NATS, bits_per_unit


def entry_numbers(spec: RowSpec, rows: slice, dtype: torch.dtype) -> EntryNumbers:
    """Those of a block of rows, rounded to its dtype."""
    assert spec.entries is not None
    numbers = spec.entries.select(rows).numbers()
    return EntryNumbers(numbers.of_student, *(x.to(dtype) for x in numbers[1:]))


def entries(
    z: Tensor, y: Tensor, stats: Statistics, spec: RowSpec, own: EntryNumbers, work: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """The entries of the divergence and of its gradient before the softmax's share, ``f`` and ``g``, in nats.

    ``z`` and ``y`` are both models' units, which this consumes, as it does three buffers of ``work``.
    """
    assert stats.teacher_logsumexp is not None
    student, teacher = (_to_bits_(z, stats.logsumexp, spec), _to_bits_(y, stats.teacher_logsumexp, spec))
    major, minor, overlap = work
    torch.where(own.of_student, z, y, out=major)
    torch.where(own.of_student, y, z, out=minor)
    # What the log-sum-exps lack shifts a row's log-ratios and scales its probabilities.
    major_low, minor_low = torch.where(own.of_student, student, teacher), torch.where(own.of_student, teacher, student)
    by_major, by_minor = torch.exp2(-major_low), torch.exp2(-minor_low)
    # The minor's log-probability less the major's, and the logarithms of their ratios to m: m is major times the major
    # share times 1 + 2^d.
    gap, ratio = torch.sub(minor, major, out=z).add_(major_low - minor_low), y
    torch.add(gap, own.log2_shares_ratio, out=ratio)
    rest = torch.abs(ratio, out=overlap).neg_().exp2_().add_(1.0).log2_().add_(own.log2_share)
    ratio.neg_().clamp_max_(0.0).sub_(rest)
    torch.minimum(gap, -own.log2_shares_ratio, out=gap).sub_(rest)
    torch.add(minor, ratio, out=overlap).exp2_()
    major.exp2_().mul_(ratio)
    minor.exp2_().mul_(gap)
    f = torch.mul(major, own.major_weight * by_major, out=ratio).addcmul_(minor, own.minor_weight * by_minor)
    g = major.mul_(own.major_in_gradient * by_major).addcmul_(minor, own.minor_in_gradient * by_minor).mul_(NATS)
    g.addcmul_(overlap, own.overlap * by_minor)
    f.mul_(NATS)
    g.masked_fill_(f >= own.clip, 0.0)
    return torch.minimum(f, own.clip, out=f), g


def _to_bits_(units: Tensor, logsumexp: Tensor, spec: RowSpec) -> Tensor:
    """Turn units into log-probabilities in bits, exactly 0 for the token of a row that has no other.

    They are too large by what is returned, ``[n, 1]``: what a log-sum-exp lacks in the units' dtype. Of nearly equal
    logits all would be rounded the same way if it were taken from each.
    """
    origin, bits = logsumexp / spec.transform.nats_per_unit, bits_per_unit(spec.transform, units.dtype)
    high = origin.to(units.dtype)
    units.sub_(high).mul_(bits)
    return (origin - high).to(units.dtype).mul_(bits)
