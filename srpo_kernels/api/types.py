"""The values that the public functions return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SRPOOutput(NamedTuple):
    """What ``srpo_loss`` returns.

    ``loss``: scalar, carries gradient. ``metrics``: detached scalar sums and counts, which add up over
    micro-batches and ranks; ``summarize_metrics`` makes means of them. ``nonfinite_rows`` counts the rows
    whose loss is not finite, or whose gradient: by the hidden states, in fp32, before a fp16 model's dtype or an
    upstream factor can overflow. ``log_probs``: ``target_ids``' shape, in nats, detached, 0 for rows that were not
    computed.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    log_probs: Tensor


class FusedOutput(NamedTuple):
    """What ``fused_loss`` returns.

    ``loss``: scalar, carries gradient. ``log_probs`` (nats) and ``losses``, the objective's: ``target_ids``' shape,
    detached, 0 for masked rows.
    """

    loss: Tensor
    log_probs: Tensor
    losses: Tensor


class TokenStats(NamedTuple):
    """What ``token_stats`` returns: ``target_ids``' shape each, in nats.

    The targets' ``log_probs``, the student's ``entropy``, its ``divergence`` from the teacher and the ``logsumexp`` of
    its transformed logits carry gradient, ``teacher_entropy`` does not. ``divergence`` and ``teacher_entropy`` are None
    without a teacher.
    """

    log_probs: Tensor
    entropy: Tensor
    divergence: Tensor | None
    teacher_entropy: Tensor | None
    logsumexp: Tensor


class TeacherStats(NamedTuple):
    """What ``teacher_stats`` returns: ``entropy`` and ``logsumexp`` of each row, in nats, detached."""

    entropy: Tensor
    logsumexp: Tensor
