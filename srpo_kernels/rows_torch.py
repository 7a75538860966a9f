"""The row passes in torch: every device, every floating dtype.

Each pass walks over blocks of a few rows that stay in the cache and works in place on the caller's buffer; nothing of
the buffer's size is allocated. A pass *consumes* the logits: what it leaves in the buffer is what the matching gradient
pass wants to find there, so that no exponential is taken twice.

- ``row_stats`` leaves ``exp(z - shift)``, or ``z - shift`` where the gradient needs logits (entropy, softcap);
  ``log_prob_gradient_`` turns either into dlogits.
- ``divergence_stats`` leaves dD/dlogits itself, one multiplication per row away from dlogits.
- ``slice_gradient_`` starts from fresh logits of any vocabulary slice and the saved statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from srpo_kernels.rows import DivergenceStats, RowGradients, RowSpec, RowStats

# A block of 2^18 fp32 logits is 1 MiB: a handful of such buffers fit into the L2 caches of two cores. Accelerators want
# few large launches instead.
_BLOCK_ELEMENTS_CPU = 1 << 18
_BLOCK_ELEMENTS_ACCELERATOR = 1 << 25
# The most blocks that one pass allocates.
SCRATCH_BLOCKS = 5


def block_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of one block: at least two, since torch reduces a single long row on one thread."""
    elements = _BLOCK_ELEMENTS_CPU if device.type == "cpu" else _BLOCK_ELEMENTS_ACCELERATOR
    return max(2, elements // vocab_size)


def row_stats(
    logits: Tensor,
    spec: RowSpec,
    *,
    target_ids: Tensor,
    support_ids: Tensor | None = None,
    entropy: bool = False,
) -> RowStats:
    """Reduce ``logits`` ``[n, V]`` to log-sum-exp, target log-probs, entropy and the log-probs of a support, per row.

    ``support_ids`` ``[n, K]`` names the support; with None and ``spec.topk`` it is the row's own top-k. Leaves
    ``exp(z - shift)`` in ``logits``; with ``entropy`` or a softcap, ``z - shift``.
    """
    n = logits.shape[0]
    shift, sum_exp = logits.new_empty(n, 1), logits.new_empty(n, 1)
    log_probs, entropies, log_tail = logits.new_empty(n), logits.new_empty(n), logits.new_empty(n)
    choose_support = support_ids is None
    if support_ids is None:
        support_ids = target_ids.new_empty(n, spec.topk)
    support_log_probs = logits.new_empty(support_ids.shape)
    keep_logits = entropy or spec.softcap is not None

    for rows, scratch in _blocks(logits, 1 if keep_logits else 0):
        z, support = logits[rows], support_ids[rows]
        _transform_(z, spec)
        if spec.topk and choose_support:
            support.copy_(z.topk(spec.topk, dim=1).indices)
        shift[rows] = z.amax(1, keepdim=True)
        z.sub_(shift[rows])
        target_logits, support_logits = z.gather(1, target_ids[rows, None]), z.gather(1, support)
        if entropy:
            _floor_(z)
        exp = torch.exp(z, out=scratch[0] if keep_logits else z)
        if spec.add_tail:
            # The complement is summed on its own: 1 - sum(support) would lose a small tail to rounding.
            support_exp = support_logits.exp()
            tail = exp.scatter_(1, support, 0.0).sum(1, keepdim=True)
            exp.scatter_(1, support, support_exp)
            sum_exp[rows] = tail + support_exp.sum(1, keepdim=True)
            log_tail[rows] = (tail / sum_exp[rows]).clamp_min(torch.finfo(z.dtype).tiny).log().squeeze(1)
        else:
            sum_exp[rows] = exp.sum(1, keepdim=True)
        log_sum = sum_exp[rows].log()
        log_probs[rows] = (target_logits - log_sum).squeeze(1)
        support_log_probs[rows] = support_logits - log_sum
        if entropy:
            entropies[rows] = (log_sum - exp.mul_(z).sum(1, keepdim=True) / sum_exp[rows]).squeeze(1)
    return RowStats(
        shift,
        sum_exp,
        log_probs,
        entropies if entropy else None,
        support_ids if spec.topk else None,
        support_log_probs if spec.topk else None,
        log_tail if spec.add_tail else None,
    )


def divergence_stats(
    student_logits: Tensor,
    teacher_logits: Tensor,
    spec: RowSpec,
    *,
    target_ids: Tensor,
    gradient: bool,
    entropy: bool = False,
) -> DivergenceStats:
    """Reduce both models' logits ``[n, V]`` to their statistics and the divergence; consume both buffers.

    With ``gradient``, leaves dD/dlogits in ``student_logits``. ``entropy`` adds the student's entropy; the teacher's
    is always there.
    """
    n = student_logits.shape[0]
    shift, sum_exp, teacher_shift, teacher_sum_exp, center = (
        student_logits.new_empty(n, 1) for _ in range(5)
    )
    log_probs, entropies, teacher_entropy, divergence = (student_logits.new_empty(n) for _ in range(4))
    needs_slope = gradient and spec.softcap is not None

    for rows, (p, q, work, *slope) in _blocks(student_logits, 4 if needs_slope else 3):
        z, y = student_logits[rows], teacher_logits[rows]
        _transform_(z, spec, *slope)
        _transform_(y, spec)
        target_logits = z.gather(1, target_ids[rows, None])
        shift[rows] = z.amax(1, keepdim=True)
        teacher_shift[rows] = y.amax(1, keepdim=True)
        _exp_of_shifted_(z, shift[rows], spec, out=p)
        _exp_of_shifted_(y, teacher_shift[rows], spec, out=q)
        sum_exp[rows] = p.sum(1, keepdim=True)
        teacher_sum_exp[rows] = q.sum(1, keepdim=True)
        p.div_(sum_exp[rows])
        q.div_(teacher_sum_exp[rows])

        log_sum, teacher_log_sum = sum_exp[rows].log(), teacher_sum_exp[rows].log()
        log_probs[rows] = (target_logits - shift[rows] - log_sum).squeeze(1)
        teacher_entropy[rows] = (teacher_log_sum - _dot(q, y, out=work)).squeeze(1)
        if entropy:
            entropies[rows] = (log_sum - _dot(p, z, out=work)).squeeze(1)
        _log_ratio_(z, y, p, q, log_sum - teacher_log_sum, spec, mixture=work)
        if spec.divergence == "forward_kl":
            center[rows] = 0.0
            value = -_dot(q, z, out=y)
        else:
            center[rows] = value = _dot(p, z, out=y)
        if spec.divergence == "jsd":
            teacher_kl = _dot(q, torch.div(q, work, out=work).log_(), out=y)
            value = value * (1.0 - spec.alpha) + teacher_kl * spec.alpha
        divergence[rows] = value.squeeze(1)
        if gradient:
            _divergence_gradient_(z, p, q, center[rows], spec)
            _apply_slope_(z, spec, *slope)
    return DivergenceStats(
        shift,
        sum_exp,
        log_probs,
        entropies if entropy else None,
        teacher_shift,
        teacher_sum_exp,
        teacher_entropy,
        divergence,
        center,
    )


def log_prob_gradient_(
    buffer: Tensor,
    stats: RowStats,
    spec: RowSpec,
    *,
    ids: Tensor,
    log_probs: Tensor,
    grad_log_probs: Tensor,
    grad_tail: Tensor | None = None,
    grad_entropy: Tensor | None = None,
) -> None:
    """Turn what ``row_stats`` left in ``buffer`` ``[n, V]`` into dlogits, for K log-probs, their tail and the entropy.

    ``ids``, ``log_probs`` and their upstream gradients g are ``[n, K]``: ``dz_v = sum_k g_k (1[v = k] - p_v)``. The
    tail adds ``g_tail (1[v outside] p_v / tail - p_v)``, the entropy ``-g_H p_v (log p_v + H)``; the latter needs a
    buffer left by ``row_stats(entropy=True)``.
    """
    total = grad_log_probs.sum(1, keepdim=True)
    # dlogits outside of the ids is this number times exp(z - shift); at an id the value is set, not added, so that a
    # large tail term never has to cancel there.
    outside = -total / stats.sum_exp
    if grad_tail is not None and stats.log_tail is not None:
        total = total + grad_tail[:, None]
        outside = (grad_tail[:, None] * torch.exp(-stats.log_tail[:, None]) - total) / stats.sum_exp
    at_ids = grad_log_probs - total * log_probs.exp()
    if spec.softcap is None and stats.entropy is None:
        buffer.mul_(outside * spec.scale)
        buffer.scatter_(1, ids, at_ids * spec.scale)
        return
    for rows, (exp, slope) in _blocks(buffer, 2):
        z = buffer[rows]
        if spec.softcap is not None:
            torch.add(z, stats.shift[rows], out=slope).mul_(spec.temperature / spec.softcap)
            _slope_of_tanh_(slope, spec)
        torch.exp(z, out=exp)
        if grad_entropy is not None and stats.entropy is not None:
            z.add_(stats.entropy[rows, None] - stats.sum_exp[rows].log())
            z.mul_(exp).mul_(-grad_entropy[rows, None] / stats.sum_exp[rows])
        else:
            z.zero_()
        z.add_(exp.mul_(outside[rows]).scatter_(1, ids[rows], at_ids[rows]))
        _apply_slope_(z, spec, slope if spec.softcap is not None else None)


def divergence_gradient_(buffer: Tensor, grad_divergence: Tensor) -> None:
    """Turn what ``divergence_stats(gradient=True)`` left in ``buffer`` into dlogits; ``grad_divergence`` is ``[n]``."""
    buffer.mul_(grad_divergence[:, None])


def slice_gradient_(
    logits: Tensor,
    teacher_logits: Tensor | None,
    stats: RowStats | DivergenceStats,
    grads: RowGradients,
    spec: RowSpec,
    *,
    target_ids: Tensor,
    first_id: int,
) -> None:
    """Turn fresh ``logits`` of the vocabulary slice that starts at ``first_id`` into dlogits, all terms at once.

    The normalisers come from ``stats``, so any slice of the vocabulary can be done on its own.
    """
    local_ids = target_ids - first_id
    inside = (local_ids >= 0) & (local_ids < logits.shape[1])
    local_ids = local_ids.clamp(0, logits.shape[1] - 1)

    for rows, (p, q, work, total, *slope) in _blocks(logits, 4 if spec.softcap is None else 5):
        z, log_sum = logits[rows], stats.sum_exp[rows].log()
        _transform_(z, spec, *slope)
        _exp_of_shifted_(z, stats.shift[rows], spec, out=p).div_(stats.sum_exp[rows])
        torch.mul(p, -grads.log_probs[rows, None], out=total)
        total.scatter_add_(1, local_ids[rows, None], (grads.log_probs[rows] * inside[rows])[:, None])
        if stats.entropy is not None:
            torch.add(z, stats.entropy[rows, None] - log_sum, out=work)
            total.addcmul_(work.mul_(p), grads.entropy[rows, None], value=-1.0)
        if grads.divergence is not None and isinstance(stats, DivergenceStats) and teacher_logits is not None:
            y = teacher_logits[rows]
            _transform_(y, spec)
            _exp_of_shifted_(y, stats.teacher_shift[rows], spec, out=q).div_(stats.teacher_sum_exp[rows])
            _log_ratio_(z, y, p, q, log_sum - stats.teacher_sum_exp[rows].log(), spec, mixture=work)
            _divergence_gradient_(z, p, q, stats.center[rows], spec)
            total.addcmul_(z, grads.divergence[rows, None])
        z.copy_(total)
        _apply_slope_(z, spec, *slope)


def _blocks(buffer: Tensor, count: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Row slices of ``buffer`` that fit the cache, each with ``count`` scratch blocks of its shape."""
    n, width = buffer.shape
    height = min(n, block_rows(width, buffer.device))
    scratch = buffer.new_empty(count, height, width)
    for start in range(0, n, height):
        rows = slice(start, min(start + height, n))
        yield rows, list(scratch[:, : rows.stop - rows.start])


def _transform_(z: Tensor, spec: RowSpec, slope: Tensor | None = None) -> None:
    """Apply the logit transform in place; ``slope`` takes its derivative when there is a softcap."""
    if spec.softcap is None:
        if spec.scale != 1.0:
            z.mul_(spec.scale)
        return
    z.mul_(spec.logit_scale / spec.softcap).tanh_()
    if slope is not None:
        _slope_of_tanh_(slope.copy_(z), spec)
    z.mul_(spec.softcap / spec.temperature)


def _slope_of_tanh_(tanh: Tensor, spec: RowSpec) -> None:
    tanh.square_().neg_().add_(1.0).mul_(spec.scale)


def _apply_slope_(dz: Tensor, spec: RowSpec, slope: Tensor | None = None) -> None:
    if slope is not None:
        dz.mul_(slope)
    elif spec.scale != 1.0:
        dz.mul_(spec.scale)


def _floor_(shifted: Tensor) -> None:
    """Keep probabilities above the smallest normal number, so that neither 0 / 0 nor 0 * inf arises below it.

    e^15 is more than any vocabulary: a floored probability stays normal after the division by the row's sum.
    """
    shifted.clamp_min_(math.log(torch.finfo(shifted.dtype).tiny) + 15.0)


def _exp_of_shifted_(z: Tensor, shift: Tensor, spec: RowSpec, out: Tensor) -> Tensor:
    z.sub_(shift)
    if spec.divergence == "jsd":
        _floor_(z)
    return torch.exp(z, out=out)


def _dot(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    return torch.mul(a, b, out=out).sum(1, keepdim=True)


def _log_ratio_(
    z: Tensor, y: Tensor, p: Tensor, q: Tensor, log_sum_difference: Tensor, spec: RowSpec, mixture: Tensor
) -> None:
    """Overwrite shifted logits ``z`` with log p - log m (jsd; ``mixture`` receives m) or log p - log q (the KLs)."""
    if spec.divergence == "jsd":
        # The logarithm of the ratio, not the difference of logarithms: its error does not grow with the logits.
        torch.lerp(p, q, spec.alpha, out=mixture)
        torch.div(p, mixture, out=z).log_()
    else:
        z.sub_(y).sub_(log_sum_difference)


def _divergence_gradient_(z: Tensor, p: Tensor, q: Tensor, center: Tensor, spec: RowSpec) -> None:
    """Overwrite the log-ratio ``z`` with dD/dz (before the transform's slope)."""
    if spec.divergence == "forward_kl":
        torch.sub(p, q, out=z)
        return
    z.sub_(center).mul_(p)
    if spec.divergence == "jsd":
        z.mul_(1.0 - spec.alpha)
