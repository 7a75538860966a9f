"""The loss in eager torch with full logits, as one writes it from the paper: every row, then masks."""

from __future__ import annotations

import math
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

import srpo_kernels as sk
from benchmarks.cases import Batch
from benchmarks.providers import Step, Unsupported, autograd_step


class Buffers(NamedTuple):
    """What is alive of the logits at the peak, in fp32 buffers of their size, rounded up."""

    policy: int
    distillation: int


_EAGER = Buffers(4, 12)


def clipped_policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, config: sk.SRPOConfig) -> Tensor:
    """GRPO's token losses."""
    ratio = torch.exp(log_probs - old_log_probs)
    clipped = ratio.clamp(1 - config.epsilon_low, 1 + config.epsilon_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def distillation_weights(
    rows: Tensor, log_probs: Tensor, old_log_probs: Tensor, teacher_entropy: Tensor, config: sk.SRPOConfig
) -> Tensor:
    """Detached weights of the distilled ``rows``, 0 elsewhere: the teacher's certainty times the clipped ratio."""
    certainty = torch.exp(-config.dw_beta * teacher_entropy) * rows
    weights = certainty / certainty.sum() * rows.sum()
    if config.distillation_is_clip is None:
        return weights
    return weights * torch.exp(log_probs.detach() - old_log_probs).clamp(max=config.distillation_is_clip)


def loss(batch: Batch) -> tuple[Tensor, Tensor]:
    config = batch.config
    log_p = _log_softmax(batch.hidden, batch.weight, config)
    log_probs = log_p.gather(-1, batch.target_ids[..., None]).squeeze(-1)
    policy_loss = clipped_policy_loss(log_probs, batch.old_log_probs, batch.advantages[:, None], config)
    total = (policy_loss * batch.policy_rows).sum()
    if batch.distills:
        with torch.no_grad():
            log_q = _log_softmax(batch.teacher_hidden, batch.weight, config)
            teacher_entropy = -(log_q.exp() * log_q).sum(-1)
        weights = distillation_weights(batch.sdpo_rows, log_probs, batch.old_log_probs, teacher_entropy, config)
        total = total + (weights * divergence(log_p, log_q, config)).sum()
    return total / batch.mask.sum(), log_probs


def prepare(batch: Batch) -> Step:
    require_memory(batch)
    return autograd_step(loss, batch)


def require_memory(batch: Batch, buffers: Buffers = _EAGER) -> None:
    """Raise Unsupported where full logits and what autograd keeps of them do not fit."""
    logits = 4 * batch.target_ids.numel() * len(batch.weight)
    needed = logits * (buffers.distillation if batch.distills else buffers.policy)
    available = available_bytes(batch.hidden.device)
    if needed > available:
        raise Unsupported(f"needs about {needed / 2**30:.0f} GiB, {available / 2**30:.0f} GiB are free")


def available_bytes(device: torch.device) -> int:
    """Free memory of the device."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else int(psutil.virtual_memory().available)


def divergence(log_p: Tensor, log_q: Tensor, config: sk.SRPOConfig) -> Tensor:
    """The configured divergence of every row over the whole vocabulary."""
    if config.divergence == "forward_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if config.divergence == "reverse_kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    log_m = torch.logaddexp(log_p + math.log(1 - config.alpha), log_q + math.log(config.alpha))
    student = (log_p.exp() * (log_p - log_m)).sum(-1)
    teacher = (log_q.exp() * (log_q - log_m)).sum(-1)
    return (1 - config.alpha) * student + config.alpha * teacher


def _log_softmax(hidden: Tensor, weight: Tensor, config: sk.SRPOConfig) -> Tensor:
    """In fp32, of logits in the model's dtype."""
    logits = (hidden @ weight.T).float()
    if config.softcap is not None:
        logits = config.softcap * torch.tanh(logits / config.softcap)
    return torch.log_softmax(logits, dim=-1)
