"""The loss in eager torch with full logits, as one writes it from the paper: every row, then masks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import srpo_kernels as sk
from srpo_kernels.verify.batches import Batch
from srpo_kernels.verify.providers import Step, Unsupported, autograd_step
from srpo_kernels.verify.timing import free_bytes
from srpo_kernels_reference.distillation import divergence, entropy_weights, importance_clip
from srpo_kernels_reference.logits import log_prob_entropy, softcapped
from srpo_kernels_reference.policy import policy_loss


class Buffers(NamedTuple):
    """What is alive of the logits at the peak, in fp32 buffers of their size, rounded up."""

    policy: int
    distillation: int


_EAGER = Buffers(4, 12)
_MEMORY_INFO = Path("/proc/meminfo")


def policy_losses(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, config: sk.SRPOConfig) -> Tensor:
    """Token losses of the policy branch; of no loss of whole sequences."""
    sequences = torch.zeros(log_probs.shape, dtype=torch.int64, device=log_probs.device)
    return policy_loss(log_probs, old_log_probs, advantages, config, sequences)


def distillation_weights(
    rows: Tensor, log_probs: Tensor, old_log_probs: Tensor, teacher_entropy: Tensor, config: sk.SRPOConfig
) -> Tensor:
    """Detached weights of the distilled ``rows``, 0 elsewhere: the teacher's certainty times the clipped ratio."""
    certainty = entropy_weights(teacher_entropy, config.dw_beta, 0.0) * rows
    weights = certainty / certainty.sum() * rows.sum()
    return weights * importance_clip(log_probs, old_log_probs, config.distillation_is_clip)


def loss(batch: Batch) -> tuple[Tensor, Tensor]:
    config = batch.config
    log_p = _log_softmax(batch.hidden, batch.weight, config)
    log_probs = log_p.gather(-1, batch.target_ids[..., None]).squeeze(-1)
    losses = policy_losses(log_probs, batch.old_log_probs, batch.advantages[:, None], config)
    total = (losses * batch.policy_rows).sum()
    if batch.distills:
        with torch.no_grad():
            log_q = _log_softmax(batch.teacher_hidden, batch.weight, config)
            teacher_entropy = log_prob_entropy(log_q)
        weights = distillation_weights(batch.sdpo_rows, log_probs, batch.old_log_probs, teacher_entropy, config)
        total = total + (weights * divergence(log_p, log_q, config.divergence, config.alpha)).sum()
    return total / batch.mask.sum(), log_probs


def prepare(batch: Batch) -> Step:
    require_memory(batch)
    return autograd_step(loss, batch)


def require_memory(batch: Batch, buffers: Buffers = _EAGER, beside: int = 0) -> None:
    """Raise Unsupported where full logits, what autograd keeps of them and ``beside`` bytes do not fit."""
    logits = 4 * batch.target_ids.numel() * len(batch.weight)
    needed = beside + logits * (buffers.distillation if batch.distills else buffers.policy)
    available = available_bytes(batch.hidden.device)
    if needed > available:
        raise Unsupported(f"needs about {needed / 2**30:.0f} GiB, {available / 2**30:.0f} GiB are free")


def available_bytes(device: torch.device) -> float:
    """Free memory of the device; no bound where the system does not tell."""
    if device.type != "cpu":
        return free_bytes(device)
    lines = _MEMORY_INFO.read_text().splitlines() if _MEMORY_INFO.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), math.inf)


def _log_softmax(hidden: Tensor, weight: Tensor, config: sk.SRPOConfig) -> Tensor:
    """In fp32, of logits in the model's dtype."""
    return softcapped((hidden @ weight.T).float(), config.softcap).log_softmax(-1)
