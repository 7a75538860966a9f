"""Losses as a user writes them, and ways to compute each: ``way(batch) -> loss``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import srpo_kernels as sk
from srpo_kernels.verify.batches import Batch
from srpo_kernels.verify.kinds import OwnWorkload, Workload


def grpo(rows: Any) -> Tensor:
    """The clipped ratio alone."""
    ratio = (rows.log_probs - rows.old_log_probs).exp()
    return -torch.minimum(ratio * rows.advantages, ratio.clamp(0.8, 1.28) * rows.advantages)


def own(rows: Any) -> Tensor:
    """A ratio, a divergence from a teacher and an entropy bonus at once."""
    ratio = (rows.log_probs - rows.old_log_probs).exp()
    losses: Tensor = 0.5 * rows.divergence - ratio * rows.advantages - 0.01 * rows.entropy
    return losses


def ratio_mask(rows: Any) -> Tensor:
    """Rows whose probability has moved by more than a tenth have a penalty alone, as in prime-rl."""
    log_ratio = rows.log_probs - rows.old_log_probs
    near = (rows.log_probs.exp() - rows.old_log_probs.exp()).abs().detach() <= 0.1
    losses: Tensor = 1e-3 * log_ratio.square() - near * log_ratio.exp() * rows.advantages
    return losses


def by_certainty(rows: Any) -> Tensor:
    """Reverse KL, and forward KL beside it where the teacher is uncertain: entropy-aware distillation."""
    losses: Tensor = rows.reverse_kl + (rows.teacher_entropy > 7.0) * rows.forward_kl
    return losses


def divergence(rows: Any) -> Tensor:
    """The divergence alone."""
    losses: Tensor = rows.divergence
    return losses


class Loss(NamedTuple):
    """A loss, what it is in words, and the statistics that it reads beside the log-probs."""

    meaning: str
    function: Callable[[Any], Tensor]
    reads: tuple[str, ...] = ()


# By the workload of their batches.
LOSSES: Mapping[Workload | OwnWorkload, Loss] = {
    "policy": Loss("GRPO", grpo),
    "jsd": Loss("ratio, JSD and entropy", own, ("entropy", "divergence")),
    "ratio_mask": Loss("masked ratio and a penalty", ratio_mask),
    "certainty": Loss("one KL or two by the teacher's entropy", by_certainty, ("forward_kl", "reverse_kl")),
    "topk_teacher": Loss("JSD from a teacher's 100 likeliest tokens", divergence, ("divergence",)),
    "support": Loss("GRPO over the 64 tokens sampled from", grpo),
}


def with_fused_loss(batch: Batch) -> Tensor:
    out = sk.fused_loss(
        objective=LOSSES[batch.workload].function,
        inputs={"advantages": batch.advantages, "old_log_probs": batch.old_log_probs},
        **_call(batch),
    )
    return out.loss / batch.mask.sum()


def with_token_stats(batch: Batch) -> Tensor:
    return _mean(batch, **sk.token_stats(**_call(batch))._asdict())


def with_srpo_loss(batch: Batch) -> Tensor:
    """GRPO alone."""
    out = sk.srpo_loss(
        batch.hidden,
        batch.weight,
        batch.target_ids,
        advantages=batch.advantages,
        mask=batch.mask,
        old_log_probs=batch.old_log_probs,
        support_ids=batch.support_ids,
    )
    return out.loss


def with_full_logits(batch: Batch) -> Tensor:
    logits = (batch.hidden @ batch.weight.T).to(batch.old_log_probs.dtype)
    target_ids = batch.target_ids[..., None]
    if batch.support_ids is not None:
        # Each row's own token comes first, and is not counted again.
        others = logits.gather(-1, batch.support_ids).masked_fill(batch.support_ids == target_ids, -torch.inf)
        log_p = torch.cat([logits.gather(-1, target_ids), others], dim=-1).log_softmax(-1)
        return _mean(batch, log_probs=log_p[..., 0])
    log_p = logits.log_softmax(-1)
    statistics = {"log_probs": log_p.gather(-1, target_ids).squeeze(-1)}
    reads = LOSSES[batch.workload].reads
    if "entropy" in reads:
        statistics["entropy"] = -(log_p.exp() * log_p).sum(-1)
    if batch.topk_ids is not None and batch.topk_log_probs is not None:
        log_p, log_q = (_with_rest(x) for x in (log_p.gather(-1, batch.topk_ids), batch.topk_log_probs.to(log_p.dtype)))
    elif batch.distills:
        with torch.no_grad():
            log_q = (batch.teacher_hidden @ batch.weight.T).to(log_p.dtype).log_softmax(-1)
    if "divergence" in reads:
        log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
        statistics["divergence"] = 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)
    if "forward_kl" in reads:
        statistics["forward_kl"] = (log_q.exp() * (log_q - log_p)).sum(-1)
        statistics["reverse_kl"] = (log_p.exp() * (log_p - log_q)).sum(-1)
        statistics["teacher_entropy"] = -(log_q.exp() * log_q).sum(-1)
    return _mean(batch, **statistics)


def _with_rest(log_probs: Tensor) -> Tensor:
    """The tokens of ``[..., K]`` and all others as one more."""
    rest = torch.log1p(-log_probs.exp().sum(-1, keepdim=True))
    return torch.cat([log_probs, rest], dim=-1)


def _call(batch: Batch) -> dict[str, Any]:
    """What ``fused_loss`` and ``token_stats`` take alike."""
    return {
        "hidden": batch.hidden,
        "weight": batch.weight,
        "target_ids": batch.target_ids,
        "mask": batch.mask,
        "teacher_hidden": batch.teacher_hidden if batch.distills and batch.topk_ids is None else None,
        "teacher_topk_ids": batch.topk_ids,
        "teacher_topk_log_probs": batch.topk_log_probs,
        "support_ids": batch.support_ids,
        "config": batch.config,
    }


def _mean(batch: Batch, **statistics: Tensor | None) -> Tensor:
    rows = SimpleNamespace(**statistics, old_log_probs=batch.old_log_probs, advantages=batch.advantages[:, None])
    losses = LOSSES[batch.workload].function(rows)
    return (losses * batch.mask).sum() / batch.mask.sum()


WAYS: dict[str, Callable[[Batch], Tensor]] = {
    "fused_loss": with_fused_loss,
    "token_stats": with_token_stats,
    "srpo_loss": with_srpo_loss,
    "naive": with_full_logits,
    "naive-compiled": with_full_logits,
}
