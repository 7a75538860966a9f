"""Two losses as a user writes them, and ways to compute each: ``way(batch) -> loss``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import srpo_kernels as sk
from benchmarks.cases import Batch


class Rows(NamedTuple):
    """What a loss reads, where nobody hands it over by name; ``entropy`` and ``divergence`` are the own loss's."""

    log_probs: Tensor
    entropy: Tensor | None
    divergence: Tensor | None
    old_log_probs: Tensor
    advantages: Tensor


def own(rows: Any) -> Tensor:
    """A ratio, a divergence from a teacher and an entropy bonus at once."""
    ratio = (rows.log_probs - rows.old_log_probs).exp()
    losses: Tensor = 0.5 * rows.divergence - ratio * rows.advantages - 0.01 * rows.entropy
    return losses


def grpo(rows: Any) -> Tensor:
    """The clipped ratio alone."""
    ratio = (rows.log_probs - rows.old_log_probs).exp()
    return -torch.minimum(ratio * rows.advantages, ratio.clamp(0.8, 1.28) * rows.advantages)


def with_fused_loss(batch: Batch) -> Tensor:
    out = sk.fused_loss(
        batch.hidden,
        batch.weight,
        batch.target_ids,
        own if batch.distills else grpo,
        inputs={"advantages": batch.advantages, "old_log_probs": batch.old_log_probs},
        mask=batch.mask,
        teacher_hidden=batch.teacher_hidden if batch.distills else None,
    )
    return out.loss / batch.mask.sum()


def with_token_stats(batch: Batch) -> Tensor:
    teacher_hidden = batch.teacher_hidden if batch.distills else None
    stats = sk.token_stats(batch.hidden, batch.weight, batch.target_ids, mask=batch.mask, teacher_hidden=teacher_hidden)
    rows = Rows(stats.log_probs, stats.entropy, stats.divergence, batch.old_log_probs, batch.advantages[:, None])
    losses = own(rows) if batch.distills else grpo(rows)
    return (losses * batch.mask).sum() / batch.mask.sum()


def with_srpo_loss(batch: Batch) -> Tensor:
    """GRPO alone."""
    out = sk.srpo_loss(
        batch.hidden,
        batch.weight,
        batch.target_ids,
        advantages=batch.advantages,
        mask=batch.mask,
        old_log_probs=batch.old_log_probs,
    )
    return out.loss


def with_full_logits(batch: Batch) -> Tensor:
    log_p = (batch.hidden @ batch.weight.T).to(batch.old_log_probs.dtype).log_softmax(-1)
    log_probs = log_p.gather(-1, batch.target_ids[..., None]).squeeze(-1)
    entropy = divergence = None
    if batch.distills:
        with torch.no_grad():
            log_q = (batch.teacher_hidden @ batch.weight.T).to(log_p.dtype).log_softmax(-1)
        log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
        divergence = 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
    rows = Rows(log_probs, entropy, divergence, batch.old_log_probs, batch.advantages[:, None])
    losses = own(rows) if batch.distills else grpo(rows)
    return (losses * batch.mask).sum() / batch.mask.sum()


WAYS: dict[str, Callable[[Batch], Tensor]] = {
    "fused_loss": with_fused_loss,
    "token_stats": with_token_stats,
    "srpo_loss": with_srpo_loss,
    "naive": with_full_logits,
    "naive-compiled": with_full_logits,
}
