"""The row passes in torch: every device, every floating dtype.

Each pass walks over blocks of a few rows that stay in the cache and works in place on the caller's buffer; nothing of
the buffer's size is allocated. A pass *consumes* the logits: what it leaves in the buffer is what the matching gradient
wants to find there, so that no exponential is taken twice. A gradient is the buffer times a factor per row, which the
products apply to their ``[n, H]`` side: a pass over the buffer less.

- ``row_stats`` leaves probabilities, or log-probabilities where the gradient needs them (entropy, softcap);
  ``log_prob_gradient_`` turns either into dlogits.
- ``divergence_stats`` leaves dD/dlogits up to the factor of ``divergence_gradient_``.
- ``slice_gradient_`` starts from fresh logits of any vocabulary slice and the saved statistics.

Within a block logits are in bits, not nats: on a CPU ``exp2`` is as exact as ``exp`` and takes half the time, and the
logits' scale, the change of base and the subtraction of the maximum are one operation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from srpo_kernels.rows import DivergenceStats, Dlogits, RowGradients, RowSpec, RowStats, Scratch, support_coefficients
from srpo_kernels.types import wide_dtype

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


def row_stats(
    logits: Tensor,
    spec: RowSpec,
    *,
    target_ids: Tensor,
    support_ids: Tensor | None = None,
    entropy: bool = False,
) -> RowStats:
    """Leave probabilities in ``logits``; with ``entropy`` or a softcap, log-probabilities in bits."""
    keep_logs = entropy or spec.softcap is not None
    parts = []
    for rows, scratch in _blocks(logits, 1 if keep_logs else 0, buffers=1):
        z = logits[rows]
        shift = _to_bits_(z, spec, floor=entropy)
        support = None if support_ids is None else support_ids[rows]
        if spec.topk and support is None:
            support = z.topk(spec.topk, dim=1).indices
        target_bits = z.gather(1, target_ids[rows, None])
        support_bits = None if support is None else z.gather(1, support)
        p = scratch[0] if keep_logs else z
        log_sum = _softmax(z, out=p)
        log_probs = (target_bits - log_sum).mul_(NATS).squeeze(1)
        support_log_probs = None if support_bits is None else (support_bits - log_sum).mul_(NATS)
        if keep_logs:
            z.sub_(log_sum)
        log_tail = None
        if spec.add_tail and support is not None:
            # The complement is summed on its own: 1 - sum(support) would lose a small tail to rounding. The gradient
            # sets the values at the support itself.
            log_tail = p.scatter_(1, support, 0.0).sum(1).clamp_min(torch.finfo(z.dtype).tiny).log()
        entropies = None
        if entropy:
            if support is not None and support_log_probs is not None:
                p.scatter_(1, support, support_log_probs.exp())
            entropies = _dot(p, z, out=p).squeeze(1).mul_(-NATS)
        parts.append(
            RowStats(log_probs, _logsumexp(shift, log_sum, spec), entropies, support, support_log_probs, log_tail)
        )
    return RowStats.concatenate(parts)


def divergence_stats(
    student_logits: Tensor,
    teacher_logits: Tensor,
    spec: RowSpec,
    *,
    target_ids: Tensor,
    gradient: bool,
    entropy: bool = False,
) -> DivergenceStats:
    """Leave, with ``gradient``, dD/dlogits in ``student_logits`` up to the factor of ``divergence_gradient_``."""
    capped, jsd = gradient and spec.softcap is not None, spec.divergence == "jsd"
    # Without entropy, jsd needs the student's probabilities alone and takes them in place.
    in_place = jsd and not entropy
    parts = []
    for rows, (q, work, *more) in _blocks(student_logits, 3 - in_place + capped, buffers=2):
        z, y = student_logits[rows], teacher_logits[rows]
        slope = more.pop() if capped else None
        p = z if in_place else more.pop()
        shift = _to_bits_(z, spec, slope, floor=jsd)
        target_bits = z.gather(1, target_ids[rows, None])
        log_sum = _softmax(z, out=p)
        log_probs = (target_bits - log_sum).mul_(NATS)
        entropies = (log_sum - _dot(p, z, out=work)).squeeze(1).mul_(NATS) if entropy else None
        teacher_shift = _to_bits_(y, spec, floor=jsd)
        teacher_log_sum = _softmax(y, out=q)
        teacher_entropy = teacher_log_sum - _dot(q, y, out=work)

        if jsd:
            log_ratio, spare = _log_ratio_to_mixture(p, q, spec, mixture=work, out=y), work
            teacher_kl = _dot(q, torch.div(q, work, out=work).log2_(), out=work)
        else:
            log_ratio, spare = z.sub_(y).sub_(log_sum - teacher_log_sum), y
        if spec.divergence == "forward_kl":
            center, divergence = torch.zeros_like(log_probs), -_dot(q, log_ratio, out=spare)
        else:
            center = divergence = _dot(p, log_ratio, out=spare)
        if jsd:
            divergence = center * (1.0 - spec.alpha) + teacher_kl * spec.alpha
        if gradient:
            # The spare buffer holds p times the log-ratio.
            _divergence_gradient(spare, p, q, center, spec, out=z)
            if slope is not None:
                z.mul_(slope)
        parts.append(
            DivergenceStats(
                log_probs.squeeze(1),
                _logsumexp(shift, log_sum, spec),
                entropies,
                _logsumexp(teacher_shift, teacher_log_sum, spec),
                teacher_entropy.squeeze(1) * NATS,
                divergence.squeeze(1) * NATS,
                center * NATS,
            )
        )
    return DivergenceStats.concatenate(parts)


def log_prob_gradient_(
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
    """Work in place on what ``row_stats`` left in ``logits``."""
    total = grad_log_probs.sum(1, keepdim=True)
    if ids.shape[1] == 1 and grad_tail is None and grad_entropy is None and spec.softcap is None:
        # dz = -g (p - 1[v = id]): the buffer needs one number changed.
        logits.scatter_add_(1, ids, torch.full_like(total, -1.0))
        return _dlogits(logits, -total * spec.constant_slope, dtype)
    total, outside = (x[:, None] for x in support_coefficients(grad_log_probs, grad_tail, stats.log_tail))
    at_ids = grad_log_probs - total * log_probs.exp()
    if spec.softcap is None and grad_entropy is None:
        logits.mul_(outside).scatter_(1, ids, at_ids)
        return _dlogits(logits, torch.full_like(total, spec.constant_slope), dtype)
    for rows, (p, slope) in _blocks(logits, 2, buffers=1):
        z = logits[rows]
        if spec.softcap is not None:
            torch.add(stats.logsumexp[rows].to(z.dtype), z, alpha=NATS, out=slope)
            _slope_of_tanh_(slope.mul_(spec.temperature / spec.softcap), spec)
        torch.exp2(z, out=p)
        if grad_entropy is not None and stats.entropy is not None:
            z.add_(stats.entropy[rows, None] / NATS).mul_(p).mul_(-NATS * grad_entropy[rows, None])
        else:
            z.zero_()
        z.add_(p.mul_(outside[rows]).scatter_(1, ids[rows], at_ids[rows]))
        if spec.softcap is not None:
            z.mul_(slope)
    return _dlogits(logits, torch.full_like(total, spec.constant_slope), dtype)


def divergence_gradient_(
    student_logits: Tensor,
    teacher_logits: Tensor,
    stats: DivergenceStats,
    spec: RowSpec,
    *,
    grad_divergence: Tensor,
    dtype: torch.dtype,
) -> Dlogits:
    """Apply a factor to what ``divergence_stats`` left."""
    factor = grad_divergence[:, None] * (spec.constant_slope * _slope_of_bits(spec))
    return _dlogits(student_logits, factor, dtype)


def _dlogits(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Dlogits:
    if values.dtype == dtype:
        return Dlogits(values, factor)
    # A factor on low-precision hidden states would be rounded once more than one on dlogits.
    return Dlogits(values.mul_(factor).to(dtype), None)


def slice_gradient_(
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
    """Work in place on both models' logits."""
    local_ids = target_ids - first_id
    inside = (local_ids >= 0) & (local_ids < logits.shape[1])
    local_ids = local_ids.clamp(0, logits.shape[1] - 1)

    for rows, (p, q, work, total, *slope) in _blocks(logits, 4 if spec.softcap is None else 5, buffers=2):
        z = logits[rows]
        _normalize_(z, stats.logsumexp[rows], spec, *slope)
        torch.exp2(z, out=p)
        torch.mul(p, -grads.log_probs[rows, None], out=total)
        total.scatter_add_(1, local_ids[rows, None], (grads.log_probs[rows] * inside[rows])[:, None])
        if stats.entropy is not None:
            torch.add(z, stats.entropy[rows, None] / NATS, out=work)
            total.addcmul_(work.mul_(p), grads.entropy[rows, None], value=-NATS)
        if grads.divergence is not None and isinstance(stats, DivergenceStats) and teacher_logits is not None:
            y = teacher_logits[rows]
            _normalize_(y, stats.teacher_logsumexp[rows], spec)
            torch.exp2(y, out=q)
            if spec.divergence == "jsd":
                _log_ratio_to_mixture(p, q, spec, mixture=work, out=z)
            else:
                z.sub_(y)
            _divergence_gradient(z.mul_(p), p, q, stats.center[rows] / NATS, spec, out=z)
            total.addcmul_(z, grads.divergence[rows, None], value=_slope_of_bits(spec))
        torch.mul(total, *slope or (spec.scale,), out=z)
    return logits.to(dtype)


def _blocks(buffer: Tensor, scratch: int, *, buffers: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Row slices of ``buffer`` that fit the cache, each with ``scratch`` blocks of its shape; at least one.

    ``buffers`` is how many of the caller's the pass works on.
    """
    n, width = buffer.shape
    height = max(1, min(n, _block_rows(width, buffer.device, scratch + buffers)))
    blocks = buffer.new_empty(scratch, height, width)
    for start in range(0, max(n, 1), height):
        rows = slice(start, min(start + height, n))
        yield rows, list(blocks[:, : rows.stop - rows.start])


def _to_bits_(z: Tensor, spec: RowSpec, slope: Tensor | None = None, *, floor: bool) -> Tensor:
    """Transform whole rows in place, into bits below their maxima, which are returned ``[n, 1]``."""
    _unit_(z, spec, slope)
    by = bits_per_unit(spec, z.dtype)
    shift = z.amax(1, keepdim=True) * by
    torch.add(-shift, z, alpha=by, out=z)
    if floor:
        _floor_(z)
    return shift


def _normalize_(z: Tensor, logsumexp: Tensor, spec: RowSpec, slope: Tensor | None = None) -> None:
    """Transform a slice of rows in place, into log-probabilities in bits.

    The log-sum-exp is taken off in two parts: it must not be rounded like a logit.
    """
    _unit_(z, spec, slope)
    by = bits_per_unit(spec, z.dtype)
    bits = logsumexp * (by / nats_per_unit(spec))
    high = bits.to(z.dtype)
    torch.add(-high, z, alpha=by, out=z).sub_((bits - high).to(z.dtype))
    if spec.divergence == "jsd":
        _floor_(z)


def nats_per_unit(spec: RowSpec) -> float:
    """What a unit stands for: a raw logit, or the tanh of one with a softcap."""
    return spec.scale if spec.softcap is None else spec.softcap / spec.temperature


def bits_per_unit(spec: RowSpec, dtype: torch.dtype) -> float:
    """The same in bits, as ``dtype`` has it: where logits are large, whatever meets them must be off by as much."""
    return torch.tensor(nats_per_unit(spec) / NATS, dtype=dtype).item()


def _unit_(z: Tensor, spec: RowSpec, slope: Tensor | None = None) -> None:
    """Turn raw logits into units in place; ``slope`` takes the transform's derivative where there is a softcap."""
    if spec.softcap is None:
        return
    z.mul_(spec.logit_scale / spec.softcap).tanh_()
    if slope is not None:
        _slope_of_tanh_(slope.copy_(z), spec)


def _slope_of_tanh_(tanh: Tensor, spec: RowSpec) -> None:
    tanh.square_().neg_().add_(1.0).mul_(spec.scale)


def _slope_of_bits(spec: RowSpec) -> float:
    """What dD/dz has in front of ``p (log-ratio - center)`` in bits; forward_kl has no logarithm there."""
    return spec.divergence_slope * (1.0 if spec.divergence == "forward_kl" else NATS)


def _softmax(bits: Tensor, out: Tensor) -> Tensor:
    """Probabilities of whole rows into ``out``; returns the log2 of the sum of ``exp2(bits)``, ``[n, 1]``."""
    total = torch.exp2(bits, out=out).sum(1, keepdim=True)
    out.mul_(total.reciprocal())
    return total.log2_()


def _logsumexp(shift: Tensor, log_sum: Tensor, spec: RowSpec) -> Tensor:
    """In nats, of a maximum and a sum in bits."""
    bits = shift.to(wide_dtype(shift.device)) + log_sum
    return bits * (nats_per_unit(spec) / bits_per_unit(spec, shift.dtype))


def _floor_(bits: Tensor) -> None:
    """Keep probabilities above the smallest normal number, so that neither 0 / 0 nor 0 * inf arises below it.

    2^22 is more than any vocabulary: a floored exponential stays normal when it is divided by the row's sum.
    """
    bits.clamp_min_(math.log2(torch.finfo(bits.dtype).tiny) + 22.0)


def _dot(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    return torch.mul(a, b, out=out).sum(1, keepdim=True)


def _log_ratio_to_mixture(p: Tensor, q: Tensor, spec: RowSpec, mixture: Tensor, out: Tensor) -> Tensor:
    """log2 p - log2 m into ``out`` and m into ``mixture``.

    The logarithm of the ratio, not the difference of logarithms: its error does not grow with the logits.
    """
    torch.lerp(p, q, spec.alpha, out=mixture)
    return torch.div(p, mixture, out=out).log2_()


def _divergence_gradient(weighted: Tensor, p: Tensor, q: Tensor, center: Tensor, spec: RowSpec, out: Tensor) -> None:
    """dD/dz up to ``_slope_of_bits`` and the transform's slope; ``weighted`` is p times the log-ratio, in bits."""
    if spec.divergence == "forward_kl":
        torch.sub(p, q, out=out)
    else:
        torch.addcmul(weighted, p, center, value=-1.0, out=out)
