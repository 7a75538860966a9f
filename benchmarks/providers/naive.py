"""The loss in eager torch with full logits, as one writes it from the paper: every row, then masks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.cases import CONFIG, Batch
from benchmarks.providers import Step, autograd_step


def clipped_policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor) -> Tensor:
    """GRPO's token losses."""
    ratio = torch.exp(log_probs - old_log_probs)
    clipped = ratio.clamp(1 - CONFIG.epsilon_low, 1 + CONFIG.epsilon_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def distillation_weights(log_probs: Tensor, old_log_probs: Tensor, teacher_entropy: Tensor) -> Tensor:
    """Detached weights of the distilled tokens: the teacher's certainty times the clipped ratio."""
    certainty = torch.exp(-CONFIG.dw_beta * teacher_entropy)
    ratio = torch.exp(log_probs.detach() - old_log_probs).clamp(max=CONFIG.distillation_is_clip)
    return certainty / certainty.mean() * ratio


def loss(batch: Batch) -> Tensor:
    log_p = torch.log_softmax(batch.hidden @ batch.weight.T, dim=-1)
    log_probs = log_p.gather(-1, batch.target_ids[..., None]).squeeze(-1)
    policy_loss = clipped_policy_loss(log_probs, batch.old_log_probs, batch.advantages[:, None])
    total = (policy_loss * batch.policy_rows).sum()
    if batch.sdpo_mask.any():
        with torch.no_grad():
            log_q = torch.log_softmax(batch.teacher_hidden @ batch.weight.T, dim=-1)
            teacher_entropy = -(log_q.exp() * log_q).sum(-1)
        rows = batch.sdpo_rows
        weights = distillation_weights(log_probs[rows], batch.old_log_probs[rows], teacher_entropy[rows])
        total = total + (weights * _jsd(log_p, log_q, CONFIG.alpha)[rows]).sum()
    return total / batch.mask.sum()


def prepare(batch: Batch) -> Step:
    return autograd_step(loss, batch)


def _jsd(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    log_m = torch.logaddexp(log_p + math.log(1 - alpha), log_q + math.log(alpha))
    student = (log_p.exp() * (log_p - log_m)).sum(-1)
    teacher = (log_q.exp() * (log_q - log_m)).sum(-1)
    return (1 - alpha) * student + alpha * teacher
