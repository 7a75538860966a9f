"""The row passes in Triton: what ``rows_torch`` computes, in one kernel per pass, from fp32 logits.

A statistics' pass leaves the logits as they are; a gradient's pass reads them once more and writes dlogits over them,
or into a buffer of the products' dtype.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from srpo_kernels.kernels.launch import on_device, row_launch, vendor_of
from srpo_kernels.kernels.primitives import LOWEST
from srpo_kernels.kernels.row_grad import row_grad_kernel
from srpo_kernels.kernels.row_jsd import row_jsd_kernel
from srpo_kernels.kernels.row_stats import row_stats_kernel
from srpo_kernels.kernels.sums import Base2, ModelSums, Transform, divergences, merge
from srpo_kernels.rows import DivergenceStats, Dlogits, RowGradients, RowSpec, RowStats, Scratch


def scratch(vocab_size: int, device: torch.device) -> Scratch:
    """Nothing of a row's size."""
    return Scratch(0, 0)


def row_stats(
    logits: Tensor,
    spec: RowSpec,
    *,
    target_ids: Tensor,
    support_ids: Tensor | None = None,
    entropy: bool = False,
) -> RowStats:
    """Leave the logits as they are."""
    transform = Transform.of(spec)
    if spec.topk and support_ids is None:
        support_ids = logits.topk(spec.topk, dim=1).indices
    if support_ids is None:
        (sums,) = _launch_stats(logits, None, transform, target_ids)
        return finish_row(sums, transform, entropy=entropy)

    # The support is taken out of the row for as long as its complement is summed: 1 - sum(support) would lose a small
    # tail to rounding.
    support_logits = logits.gather(1, support_ids)
    targets = transform.units(logits.gather(1, target_ids[:, None]).squeeze(1))
    logits.scatter_(1, support_ids, LOWEST.value)
    (complement,) = _launch_stats(logits, None, transform, target_ids)
    logits.scatter_(1, support_ids, support_logits)
    units = transform.units(support_logits)
    pairs = zip(complement, ModelSums.of_support(units, transform), strict=True)
    (sums,) = merge([ModelSums._make(map(torch.stack, pairs))], transform)
    sums = sums._replace(target=targets)
    stats = finish_row(sums, transform, entropy=entropy)
    log_probs = transform.slope * (units - sums.maximum[:, None]) - sums.total.log()[:, None]
    log_tail = None
    if spec.add_tail:
        log_tail = (complement.logsumexp(transform) - stats.logsumexp.squeeze(1)).to(logits.dtype)
    return stats._replace(support_ids=support_ids, support_log_probs=log_probs, log_tail=log_tail)


def divergence_stats(
    student_logits: Tensor,
    teacher_logits: Tensor,
    spec: RowSpec,
    *,
    target_ids: Tensor,
    gradient: bool,
    entropy: bool = False,
) -> DivergenceStats:
    """Leave both models' logits as they are."""
    transform = Transform.of(spec)
    student, teacher = _launch_stats(student_logits, teacher_logits, transform, target_ids)
    stats = finish_divergence(student, teacher, spec, transform, entropy=entropy)
    if spec.divergence != "jsd":
        return stats
    kl, teacher_kl = _launch_jsd(student_logits, teacher_logits, stats.logsumexp, stats.teacher_logsumexp, spec)
    return stats._replace(divergence=(1.0 - spec.alpha) * kl + spec.alpha * teacher_kl, center=kl[:, None])


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
    """Write over the logits, or into a new buffer of ``dtype``."""
    total = grad_log_probs.sum(1)
    outside = -total
    if grad_tail is not None and stats.log_tail is not None:
        total = total + grad_tail
        outside = grad_tail * torch.exp(-stats.log_tail) - total
    by_log = torch.zeros_like(total)
    entropy_term = by_log
    if grad_entropy is not None and stats.entropy is not None:
        by_log, entropy_term = -grad_entropy, -grad_entropy * stats.entropy
    values = _launch_gradient(
        logits,
        None,
        spec,
        logsumexp=stats.logsumexp,
        teacher_logsumexp=None,
        by_p=outside + entropy_term,
        by_log=by_log,
        by_divergence=torch.zeros_like(total),
        by_p_at_ids=-total + entropy_term,
        ids=ids,
        id_grads=grad_log_probs,
        dtype=dtype,
    )
    return Dlogits(values, None)


def divergence_gradient_(
    student_logits: Tensor,
    teacher_logits: Tensor,
    stats: DivergenceStats,
    spec: RowSpec,
    *,
    grad_divergence: Tensor,
    dtype: torch.dtype,
) -> Dlogits:
    """Write over the student's logits, or into a new buffer of ``dtype``."""
    nothing = torch.zeros_like(grad_divergence)
    values = _slice_gradient(
        student_logits,
        teacher_logits,
        stats._replace(entropy=None),
        RowGradients(nothing, nothing, grad_divergence),
        spec,
        ids=torch.full_like(grad_divergence, -1, dtype=torch.int64),
        dtype=dtype,
    )
    return Dlogits(values, None)


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
    """Write over the logits, or into a new buffer of ``dtype``."""
    return _slice_gradient(logits, teacher_logits, stats, grads, spec, ids=target_ids - first_id, dtype=dtype)


def _slice_gradient(
    logits: Tensor,
    teacher_logits: Tensor | None,
    stats: RowStats | DivergenceStats,
    grads: RowGradients,
    spec: RowSpec,
    *,
    ids: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Dlogits of the slice in which the targets are ``ids`` ``[n]``; those outside of it are another slice's."""
    by_p, by_log = -grads.log_probs, torch.zeros_like(grads.log_probs)
    if stats.entropy is not None:
        by_log = -grads.entropy
        by_p = by_p - grads.entropy * stats.entropy
    by_divergence, teacher_lse = torch.zeros_like(by_p), None
    if isinstance(stats, DivergenceStats) and grads.divergence is not None:
        teacher_lse = stats.teacher_logsumexp
        by_divergence = grads.divergence * spec.divergence_slope
        # p - q for forward_kl, p (log-ratio - center) for the others.
        by_p = by_p + by_divergence * (1.0 if spec.divergence == "forward_kl" else -stats.center.squeeze(1))
    return _launch_gradient(
        logits,
        teacher_logits,
        spec,
        logsumexp=stats.logsumexp,
        teacher_logsumexp=teacher_lse,
        by_p=by_p,
        by_log=by_log,
        by_divergence=by_divergence,
        by_p_at_ids=by_p,
        ids=ids[:, None],
        id_grads=grads.log_probs[:, None],
        dtype=dtype,
    )


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


def _launch_stats(z: Tensor, y: Tensor | None, transform: Transform, target_ids: Tensor) -> list[ModelSums]:
    """The sums of the student, and of the teacher where there is one."""
    models = 1 if y is None else 2
    sums = z.new_empty(len(z), models, 5)
    launch = row_launch(models, vendor_of(z.device))
    if len(z):
        with on_device(z):
            row_stats_kernel[(len(z),)](
                z,
                z if y is None else y,
                target_ids.contiguous(),
                sums,
                z.stride(0),
                (z if y is None else y).stride(0),
                z.shape[1],
                transform.inner,
                transform.slope2,
                TEACHER=y is not None,
                SOFTCAP=transform.softcap,
                LANES=launch.lanes,
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
            )
    return [ModelSums.unpack(model) for model in sums.unbind(1)]


def _launch_jsd(z: Tensor, y: Tensor, lse: Tensor, teacher_lse: Tensor, spec: RowSpec) -> tuple[Tensor, Tensor]:
    """``KL(p || m)`` and ``KL(q || m)`` in nats."""
    transform, vendor = Transform.of(spec), vendor_of(z.device)
    student, teacher = Base2.of(lse, z.dtype), Base2.of(teacher_lse, z.dtype)
    launch = row_launch(2, vendor)
    kl2 = z.new_empty(len(z), 2)
    if len(z):
        with on_device(z):
            row_jsd_kernel[(len(z),)](
                z,
                y,
                torch.cat([student.high, teacher.high, *_shares(student, teacher, spec)], dim=1),
                kl2,
                z.stride(0),
                y.stride(0),
                z.shape[1],
                transform.inner,
                transform.slope2,
                SOFTCAP=transform.softcap,
                LANES=launch.lanes,
                HARDWARE_LOG=vendor == "nvidia",
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
            )
    # The kernel's log p is off by what its log-sum-exp lacks; p sums to 1.
    kl, teacher_kl = ((kl2 - torch.cat([student.low, teacher.low], dim=1)) * math.log(2.0)).unbind(1)
    return kl, teacher_kl


def _launch_gradient(
    z: Tensor,
    y: Tensor | None,
    spec: RowSpec,
    *,
    logsumexp: Tensor,
    teacher_logsumexp: Tensor | None,
    by_p: Tensor,
    by_log: Tensor,
    by_divergence: Tensor,
    by_p_at_ids: Tensor,
    ids: Tensor,
    id_grads: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Launch ``row_grad_kernel``; coefficients ``[n]`` are per nat and do not know the transform's slope yet."""
    transform, vendor = Transform.of(spec), vendor_of(z.device)
    divergence = "none" if y is None else spec.divergence
    student = Base2.of(logsumexp, z.dtype)
    teacher = student if teacher_logsumexp is None else Base2.of(teacher_logsumexp, z.dtype)
    # What the log-sum-exps lack in fp32 shifts each log-ratio by a number per row: by_p takes it.
    by_log, by_divergence = by_log[:, None] * math.log(2.0), by_divergence[:, None]
    missing = by_log * student.low
    if divergence == "forward_kl":
        by_divergence = by_divergence * teacher.correction
    elif divergence != "none":
        by_divergence = by_divergence * math.log(2.0)
        missing = missing + by_divergence * (student.low - (teacher.low if divergence == "reverse_kl" else 0.0))
    terms = [by_p[:, None] - missing, by_log, by_divergence, by_p_at_ids[:, None] - missing]
    coefficients = torch.cat(
        [student.high, teacher.high, *(x * spec.scale for x in terms), *_shares(student, teacher, spec)], dim=1
    )
    out = z
    if dtype != z.dtype:
        out = torch.empty_strided(z.shape, z.stride(), dtype=dtype, device=z.device)
    launch = row_launch(1 if y is None else 2, vendor)
    if len(z):
        with on_device(z):
            row_grad_kernel[(len(z),)](
                z,
                z if y is None else y,
                out,
                ids.contiguous(),
                (id_grads * spec.scale).contiguous(),
                coefficients,
                z.stride(0),
                (z if y is None else y).stride(0),
                out.stride(0),
                z.shape[1],
                ids.shape[1],
                transform.inner,
                transform.slope2,
                DIVERGENCE=divergence,
                SOFTCAP=transform.softcap,
                LANES=launch.lanes,
                BLOCK_IDS=triton.next_power_of_2(ids.shape[1]),
                HARDWARE_LOG=vendor == "nvidia",
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
            )
    return out


def _shares(student: Base2, teacher: Base2, spec: RowSpec) -> tuple[Tensor, Tensor]:
    """The models' shares in the mixture, for probabilities as the kernels see them."""
    return (1.0 - spec.alpha) * student.correction, spec.alpha * teacher.correction
