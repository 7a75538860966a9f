"""The same loss composed from TRL's chunked log-probs and chunked divergence.

As its trainers do, padding is dropped where TRL runs Triton and computed elsewhere, and tokens with advantage 0 are
computed like any other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import _use_triton

from srpo_kernels.verify.batches import Batch
from srpo_kernels.verify.providers import Step, autograd_step
from srpo_kernels.verify.providers.naive import distillation_weights, policy_losses

# What TRL's trainers pass.
_VOCAB_CHUNK = 32_768
_TEMPERATURE = 1.0
_LOGIT_SCALE = 1.0

_BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0}


def loss(batch: Batch, packed: bool) -> tuple[Tensor, Tensor]:
    """Over the valid rows of each branch where ``packed``, else over every row of its sequences."""
    terms, log_probs = [], torch.zeros_like(batch.old_log_probs)
    sequences = batch.sdpo_mask[:, None].expand_as(batch.mask)
    if not batch.sdpo_mask.all():
        rows = batch.policy_rows if packed else ~sequences
        policy_log_probs = _log_probs(batch, batch.hidden[rows], rows)[0]
        advantages = batch.advantages[:, None].expand_as(rows)[rows]
        losses = policy_losses(policy_log_probs, batch.old_log_probs[rows], advantages, batch.config)
        terms.append(losses.masked_fill(~batch.mask[rows], 0.0).sum())
        log_probs = log_probs.masked_scatter(rows, policy_log_probs.detach())
    if batch.distills:
        rows = batch.sdpo_rows if packed else sequences
        terms.append(_distillation_loss(batch, rows))
    return torch.stack(terms).sum() / batch.mask.sum(), log_probs


def prepare(batch: Batch, packed: bool | None = None) -> Step:
    packed = _use_triton(batch.hidden.device) if packed is None else packed
    return autograd_step(lambda batch: loss(batch, packed), batch)


def _distillation_loss(batch: Batch, rows: Tensor) -> Tensor:
    hidden, teacher_hidden, weight, config = batch.hidden[rows], batch.teacher_hidden[rows], batch.weight, batch.config
    # The divergence comes with neither the student's log-probs nor the teacher's entropy.
    with torch.no_grad():
        log_probs = _log_probs(batch, hidden, rows)[0]
        teacher_entropy = _log_probs(batch, teacher_hidden, rows, ("entropy",))[1]
    weights = distillation_weights(batch.mask[rows], log_probs, batch.old_log_probs[rows], teacher_entropy, config)
    beta = _BETAS.get(config.divergence, config.alpha)
    transform = (_LOGIT_SCALE, config.softcap)
    divergence, _ = ChunkedDivergenceFunction.apply(
        hidden, weight, None, teacher_hidden, weight.detach(), None, beta, _TEMPERATURE, *transform, *transform
    )
    total: Tensor = (weights * divergence).sum()
    return total


def _log_probs(batch: Batch, hidden: Tensor, rows: Tensor, outputs: tuple[str, ...] = ()) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and, where ``outputs`` names it, the entropy."""
    log_probs, entropy, *_ = ChunkedLogProbFunction.apply(
        hidden,
        batch.weight,
        None,
        batch.target_ids[rows],
        _TEMPERATURE,
        _VOCAB_CHUNK,
        batch.config.softcap,
        _LOGIT_SCALE,
        outputs,
    )
    return log_probs, entropy
