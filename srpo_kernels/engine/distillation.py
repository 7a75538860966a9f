"""One chunk of distillation rows: from both models' logits to statistics, and from upstream gradients to dlogits."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from srpo_kernels.checks import refuse_name
from srpo_kernels.engine.sharded import row_stats_later
from srpo_kernels.losses import objective
from srpo_kernels.losses.config import SRPOConfig
from srpo_kernels.rows.contract import Dlogits, RowPasses, RowSpec


class DistilledChunk(NamedTuple):
    """Statistics ``[n]`` of a chunk.

    ``loss`` is the token loss before any weight, ``divergence`` what a log should show of it. ``gradient_`` turns
    the ``[n]`` upstream gradients of ``loss`` into dlogits and consumes both models' logits.
    """

    log_probs: Tensor
    teacher_entropy: Tensor
    divergence: Tensor
    loss: Tensor
    gradient_: Callable[[Tensor], Dlogits]


def distill_chunk(
    passes: RowPasses,
    z: Tensor,
    y: Tensor,
    target_ids: Tensor,
    spec: RowSpec,
    config: SRPOConfig,
    *,
    gradient: bool,
    dtype: torch.dtype,
) -> DistilledChunk:
    """Reduce the student's logits ``z`` and the teacher's ``y``, ``[n, V]`` both, after ``distillation_mode``.

    ``gradient`` says that ``gradient_`` will be called; ``dtype`` is that of its dlogits.
    """
    match config.distillation_mode:
        case "full":
            return _full(passes, z, y, target_ids, spec, gradient, dtype)
        case "sampled":
            return _sampled(passes, z, y, target_ids, spec, dtype)
        case "topk":
            return _topk(passes, z, y, target_ids, spec, config, dtype)
        case unknown:
            refuse_name("distillation_mode", unknown)


def _full(
    passes: RowPasses, z: Tensor, y: Tensor, target_ids: Tensor, spec: RowSpec, gradient: bool, dtype: torch.dtype
) -> DistilledChunk:
    stats = passes.divergence_stats(z, y, spec, target_ids=target_ids, gradient=gradient)

    def gradient_(upstream: Tensor) -> Dlogits:
        return passes.divergence_gradient_(z, y, stats, spec, grad_divergence=upstream, dtype=dtype)

    return DistilledChunk(stats.log_probs, stats.teacher_entropy, stats.divergence, stats.divergence, gradient_)


def _sampled(
    passes: RowPasses, z: Tensor, y: Tensor, target_ids: Tensor, spec: RowSpec, dtype: torch.dtype
) -> DistilledChunk:
    student_stats = row_stats_later(passes, z, spec, target_ids=target_ids)
    teacher = passes.row_stats(y, spec, target_ids=target_ids, entropy=True)
    student = student_stats()
    assert teacher.entropy is not None
    with torch.enable_grad():
        log_probs = student.log_probs.detach().requires_grad_()
        loss = objective.sampled_divergence(log_probs, teacher.log_probs)

    def gradient_(upstream: Tensor) -> Dlogits:
        (grad,) = torch.autograd.grad(loss, log_probs, upstream)
        return passes.log_prob_gradient_(
            z,
            student,
            spec,
            ids=target_ids[:, None],
            log_probs=student.log_probs[:, None],
            grad_log_probs=grad[:, None],
            dtype=dtype,
        )

    difference = student.log_probs - teacher.log_probs
    return DistilledChunk(student.log_probs, teacher.entropy, difference, loss.detach(), gradient_)


def _topk(
    passes: RowPasses, z: Tensor, y: Tensor, target_ids: Tensor, spec: RowSpec, config: SRPOConfig, dtype: torch.dtype
) -> DistilledChunk:
    student = passes.row_stats(z, spec, target_ids=target_ids)
    ids = student.support_ids
    teacher = passes.row_stats(y, spec, target_ids=target_ids, support_ids=ids, entropy=True)
    assert ids is not None and student.support_log_probs is not None
    assert teacher.entropy is not None and teacher.support_log_probs is not None
    student_log_probs = student.support_log_probs
    with torch.enable_grad():
        log_p = student_log_probs.detach().requires_grad_()
        log_tail = None if student.log_tail is None else student.log_tail.detach().requires_grad_()
        loss = objective.support_divergence(log_p, teacher.support_log_probs, log_tail, teacher.log_tail, config)

    def gradient_(upstream: Tensor) -> Dlogits:
        variables = [log_p] if log_tail is None else [log_p, log_tail]
        grad_log_probs, *grad_tail = torch.autograd.grad(loss, variables, upstream)
        return passes.log_prob_gradient_(
            z,
            student,
            spec,
            ids=ids,
            log_probs=student_log_probs,
            grad_log_probs=grad_log_probs,
            grad_tail=grad_tail[0] if grad_tail else None,
            dtype=dtype,
        )

    divergence = loss.detach()
    return DistilledChunk(student.log_probs, teacher.entropy, divergence, divergence, gradient_)
