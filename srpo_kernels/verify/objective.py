"""``fused_loss`` with an objective of every statistic, and the same composed of the oracle's statistics."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import srpo_kernels_reference as reference
from srpo_kernels import FusedOutput, SRPOConfig, fused_loss
from srpo_kernels.verify.inputs import COMPARED, TRANSFORM
from srpo_kernels_reference.logits import teacher_head

_ROWS = ("advantages", "old_log_probs", "is_weights")
# Not of an objective without sequences or a reference.
_UNUSED = ("ref_log_probs", "sequence_ids")


def objective(rows: Any, *, knows_targets: bool) -> Tensor:
    """The losses of rows that have all statistics, ``[n]``; ``knows_targets``: the teacher's log-probs of them too."""
    losses: Tensor = -(rows.log_probs - rows.old_log_probs).exp() * rows.advantages * rows.is_weights
    certainty = (-0.1 * rows.teacher_entropy).exp()
    if knows_targets:
        certainty = certainty + 0.1 * rows.teacher_log_probs.exp()
    losses = losses + certainty * rows.divergence - 0.1 * rows.entropy
    return losses


def library(**arguments: Any) -> FusedOutput:
    """``fused_loss`` of the arguments that ``srpo_loss`` takes; rows that are distilled have a teacher."""
    head, rows, taught = _split(arguments)
    own = partial(objective, knows_targets=head["teacher_hidden"] is not None)
    return fused_loss(**head, objective=own, inputs=rows, teacher_mask=taught)


def oracle(*, config: SRPOConfig, project: Any, **arguments: Any) -> FusedOutput:
    """The same of full logits."""
    head, rows, taught = _split(arguments)
    ids, mask = head["target_ids"], head["mask"]
    transform = {name: getattr(config, name) for name in TRANSFORM}
    compared = {name: getattr(config, name) for name in COMPARED}
    stats = reference.token_stats(**head, **transform, **compared, project=project)
    teacher_log_probs = torch.zeros_like(stats.log_probs)
    if head["teacher_hidden"] is not None:
        weight, bias = teacher_head(*(head[name] for name in ("weight", "bias", "teacher_weight", "teacher_bias")))
        own = transform if config.teacher_transform is None else config.teacher_transform._asdict()
        teacher_log_probs = reference.token_stats(
            head["teacher_hidden"], weight, ids, mask=mask, bias=bias, **own, project=project
        ).log_probs
    per_row = rows if taught is None else rows | {"has_teacher": taught}
    inputs = {name: (x if x.shape == ids.shape else x[:, None].expand_as(ids))[mask] for name, x in per_row.items()}
    has_teacher = inputs.pop("has_teacher", 1.0)
    assert stats.divergence is not None and stats.teacher_entropy is not None
    valid = SimpleNamespace(
        log_probs=stats.log_probs[mask],
        entropy=stats.entropy[mask],
        divergence=stats.divergence[mask] * has_teacher,
        teacher_entropy=stats.teacher_entropy[mask].detach() * has_teacher,
        teacher_log_probs=teacher_log_probs[mask].detach() * has_teacher,
        **inputs,
    )
    losses = objective(valid, knows_targets=head["teacher_hidden"] is not None)
    spread = torch.zeros_like(stats.log_probs.detach()).masked_scatter(mask, losses.detach())
    return FusedOutput(losses.sum(), stats.log_probs.detach(), spread)


def _split(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor], Tensor | None]:
    """Arguments of ``fused_loss`` and both heads, an objective's inputs, and which rows have a teacher."""
    head = {name: x for name, x in arguments.items() if name not in (*_ROWS, *_UNUSED, "sdpo_mask")}
    return head, {name: arguments[name] for name in _ROWS}, arguments["sdpo_mask"]
