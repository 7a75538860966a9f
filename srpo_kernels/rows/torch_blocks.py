"""What the row passes in torch are made of: blocks of a few rows, the logit transform, base-2 softmax.

Within a block logits are in bits, not nats: on a CPU ``exp2`` is as exact as ``exp`` and takes half the time, and the
logits' scale, the change of base and the subtraction of the maximum are one operation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from srpo_kernels.rows.contract import Scratch
from srpo_kernels.rows.dtypes import wide_dtype
from srpo_kernels.rows.spec import LOWEST, LogitTransform, RowSpec

NATS = math.log(2.0)
# What one thread works on at a time, over all buffers of a pass: 8 MiB of fp32, a current core's share of the L3 cache.
# Less would stay in L2, but there every operation waits longer for its slowest thread than it saves.
_ELEMENTS_PER_THREAD = 1 << 21
# And all threads together.
_ELEMENTS_CPU = 1 << 24
# Accelerators want few large launches instead.
_ELEMENTS_ACCELERATOR = 1 << 25
# The most blocks that one pass allocates, and how many buffers it then works on.
_SCRATCH_BLOCKS = 5
_MOST_BUFFERS = _SCRATCH_BLOCKS + 2
# Up to here the maximum in bits is rounded, an offset that the sum of a row has as well: of a token that has all of the
# probability, the log-prob is then a rounding in place of 0, which a teacher's log-prob may multiply. Beyond, it is 0.
_MOST_BITS = 2.0**10


def scratch(vocab_size: int, device: torch.device) -> Scratch:
    """What a pass allocates at most."""
    return Scratch(_SCRATCH_BLOCKS, _block_rows(vocab_size, device, _MOST_BUFFERS))


def _block_rows(vocab_size: int, device: torch.device, buffers: int) -> int:
    """Rows of one block: the same number for every thread, since a softmax takes each row on one thread."""
    if device.type != "cpu":
        return max(1, _ELEMENTS_ACCELERATOR // vocab_size)
    threads = torch.get_num_threads()
    elements = min(_ELEMENTS_PER_THREAD, _ELEMENTS_CPU // threads)
    return threads * max(1, elements // (vocab_size * buffers))


def blocks(buffer: Tensor, scratch: int, *, buffers: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Row slices of ``buffer`` that fit the cache, each with ``scratch`` blocks of its shape; at least one.

    ``buffers`` is how many of the caller's the pass works on.
    """
    n, width = buffer.shape
    height = max(1, min(n, _block_rows(width, buffer.device, scratch + buffers)))
    spare = buffer.new_empty(scratch, height, width)
    for start in range(0, max(n, 1), height):
        rows = slice(start, min(start + height, n))
        yield rows, list(spare[:, : rows.stop - rows.start])


def bits_per_unit(transform: LogitTransform, dtype: torch.dtype) -> float:
    """What a unit stands for, as ``dtype`` has it: where logits are large, whatever meets them is off by as much."""
    return torch.tensor(transform.nats_per_unit / NATS, dtype=dtype, device="cpu").item()


def to_units_(z: Tensor, transform: LogitTransform, slope: Tensor | None = None, *, finite: bool = True) -> None:
    """Turn raw logits into units in place; ``slope`` takes the transform's derivative where there is a softcap.

    Not ``finite`` spares a pass where minus infinity does no harm.
    """
    if transform.softcap is None:
        if finite:
            z.clamp_min_(LOWEST)
        return
    z.mul_(transform.logit_scale / transform.softcap).tanh_()
    if slope is not None:
        slope_of_units(z, transform, out=slope)


def slope_of_units(units: Tensor, transform: LogitTransform, out: Tensor) -> Tensor:
    """The transform's derivative where there is a softcap, into ``out``."""
    return out.copy_(units).square_().neg_().add_(1.0).mul_(transform.scale)


def to_bits_(z: Tensor, transform: LogitTransform, slope: Tensor | None = None, *, finite: bool) -> Tensor:
    """Transform whole rows in place, into bits below their maxima; returns the maxima ``[n, 1]`` in a wide dtype."""
    to_units_(z, transform, slope, finite=finite)
    by, maximum = bits_per_unit(transform, z.dtype), z.amax(1, keepdim=True)
    shift, wide = maximum * by, wide_dtype(z.device)
    # The host reads nothing of an accelerator's.
    if z.is_cpu and bool((shift.abs() < _MOST_BITS).all()):
        torch.add(-shift, z, alpha=by, out=z)
        return shift.to(wide)
    z.sub_(maximum).mul_(by)
    return maximum.to(wide) * by


def normalize_(units: Tensor, logsumexp: Tensor, spec: RowSpec) -> None:
    """Turn units into log-probabilities in bits, in place.

    The log-sum-exp is taken off in two parts: it must not be rounded like a logit.
    """
    by = bits_per_unit(spec.transform, units.dtype)
    bits = logsumexp * (by / spec.transform.nats_per_unit)
    high = bits.to(units.dtype)
    torch.add(-high, units, alpha=by, out=units).sub_((bits - high).to(units.dtype))
    if spec.mixture is not None:
        floor_(units)


def bits_at(bits: Tensor, ids: Tensor, shift: Tensor, transform: LogitTransform) -> Tensor:
    """What ``to_bits_`` left at ``ids`` ``[n, K]``, minus infinity as ``LOWEST``, before any floor."""
    lowest = (LOWEST * bits_per_unit(transform, bits.dtype) - shift).to(bits.dtype)
    return torch.maximum(bits.gather(1, ids), lowest)


def softmax(bits: Tensor, out: Tensor) -> Tensor:
    """Probabilities of whole rows into ``out``; returns the sum of ``exp2(bits)``, ``[n, 1]``."""
    total = torch.exp2(bits, out=out).sum(1, keepdim=True)
    # Not times the reciprocal: a row that has one token alone gives it all of its probability.
    out.div_(total)
    return total


def logsumexp(shift: Tensor, log_sum: Tensor, transform: LogitTransform) -> Tensor:
    """In nats, of a maximum and a sum in bits."""
    return (shift + log_sum) * (transform.nats_per_unit / bits_per_unit(transform, log_sum.dtype))


def floor_(bits: Tensor) -> None:
    """Keep probabilities above the smallest normal number, so that neither 0 / 0 nor 0 * inf arises below it.

    2^22 is more than any vocabulary: a floored exponential stays normal when it is divided by the row's sum.
    """
    bits.clamp_min_(math.log2(torch.finfo(bits.dtype).tiny) + 22.0)


def dot(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Row by row, ``[n, 1]``; ``out`` takes the products."""
    return torch.mul(a, b, out=out).sum(1, keepdim=True)


def argmax(z: Tensor) -> Tensor:
    """Where each row has its maximum, ``[n, 1]``; 0 where that is NaN."""
    # PyTorch's own takes ten times as long on a CPU as comparing with the maximum.
    row, column = (z == z.amax(1, keepdim=True)).nonzero(as_tuple=True)
    return torch.zeros_like(z[:, 0], dtype=torch.int64).scatter_reduce_(0, row, column, "amax")[:, None]


def nats_of_gradient(spec: RowSpec) -> float:
    """What the divergence's own term counts in: bits where it has a logarithm, else 1."""
    logarithm = spec.kl != "forward_kl" if spec.mixture is None else bool(spec.mixture.student_weight)
    return NATS if logarithm else 1.0


def inside(ids: Tensor, z: Tensor) -> Tensor:
    """Which ids are of the slice that ``z`` has."""
    return (ids >= 0) & (ids < z.shape[1])
