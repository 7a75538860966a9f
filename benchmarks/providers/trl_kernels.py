"""The same loss composed from TRL's chunked log-probs and chunked divergence, on each branch's valid rows.

TRL's trainers drop padding before these functions where Triton runs; here it is dropped everywhere. As in its
trainers, tokens with advantage 0 are computed like any other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from benchmarks.cases import CONFIG, Batch
from benchmarks.providers import Step, autograd_step
from benchmarks.providers.naive import clipped_policy_loss, distillation_weights

# What TRL's trainers pass.
_VOCAB_CHUNK = 32_768
_TEMPERATURE = 1.0


def loss(batch: Batch) -> Tensor:
    terms = []
    if batch.policy_rows.any():
        terms.append(_policy_loss(batch, batch.policy_rows))
    if batch.sdpo_rows.any():
        terms.append(_distillation_loss(batch, batch.sdpo_rows))
    return torch.stack(terms).sum() / batch.mask.sum()


def prepare(batch: Batch) -> Step:
    return autograd_step(loss, batch)


def _policy_loss(batch: Batch, rows: Tensor) -> Tensor:
    log_probs, _ = _log_probs(batch.hidden[rows], batch.weight, batch.target_ids[rows])
    advantages = batch.advantages[:, None].expand_as(rows)[rows]
    return clipped_policy_loss(log_probs, batch.old_log_probs[rows], advantages).sum()


def _distillation_loss(batch: Batch, rows: Tensor) -> Tensor:
    hidden, teacher_hidden, weight = batch.hidden[rows], batch.teacher_hidden[rows], batch.weight
    # The divergence comes with neither the student's log-probs nor the teacher's entropy.
    with torch.no_grad():
        log_probs, _ = _log_probs(hidden, weight, batch.target_ids[rows])
        _, teacher_entropy = _log_probs(teacher_hidden, weight, batch.target_ids[rows], ("entropy",))
    weights = distillation_weights(log_probs, batch.old_log_probs[rows], teacher_entropy)
    divergence, _ = ChunkedDivergenceFunction.apply(
        hidden, weight, None, teacher_hidden, weight.detach(), None, CONFIG.alpha, _TEMPERATURE
    )
    total: Tensor = (weights * divergence).sum()
    return total


def _log_probs(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, outputs: tuple[str, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and, where ``outputs`` names it, the entropy."""
    log_probs, entropy, *_ = ChunkedLogProbFunction.apply(
        hidden, weight, None, target_ids, _TEMPERATURE, _VOCAB_CHUNK, None, 1.0, outputs
    )
    return log_probs, entropy
