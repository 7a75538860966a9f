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
    for units, logsumexp in ((z, stats.logsumexp), (y, stats.teacher_logsumexp)):
        _to_bits_(units, logsumexp, spec)
    major, minor, overlap = work
    torch.where(own.of_student, z, y, out=major)
    torch.where(own.of_student, y, z, out=minor)
    # The minor's log-probability less the major's, and the logarithms of their ratios to m: m is major times the major
    # share times 1 + 2^d.
    gap, ratio = torch.sub(minor, major, out=z), y
    torch.add(gap, own.log2_shares_ratio, out=ratio)
    rest = torch.abs(ratio, out=overlap).neg_().exp2_().add_(1.0).log2_().add_(own.log2_share)
    ratio.neg_().clamp_max_(0.0).sub_(rest)
    torch.minimum(gap, -own.log2_shares_ratio, out=gap).sub_(rest)
    torch.add(minor, ratio, out=overlap).exp2_()
    major.exp2_().mul_(ratio)
    minor.exp2_().mul_(gap)
    f = torch.mul(major, own.major_weight, out=ratio).addcmul_(minor, own.minor_weight).mul_(NATS)
    g = major.mul_(own.major_in_gradient).addcmul_(minor, own.minor_in_gradient).mul_(NATS)
    g.addcmul_(overlap, own.overlap)
    g.masked_fill_(f >= own.clip, 0.0)
    return torch.minimum(f, own.clip, out=f), g


def _to_bits_(units: Tensor, logsumexp: Tensor, spec: RowSpec) -> None:
    """Turn units into log-probabilities in bits, exactly 0 for the token of a row that has no other."""
    origin = logsumexp / spec.transform.nats_per_unit
    high = origin.to(units.dtype)
    units.sub_(high).sub_((origin - high).to(units.dtype)).mul_(bits_per_unit(spec.transform, units.dtype))
