"""The checks that a compiled graph cannot make: they run within the operation, most of them on tensor data."""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_kernels.checks import require_shape


def check_row_values(
    target_ids: Tensor,
    valid: Tensor,
    routed: Tensor,
    vocab_size: int,
    *,
    has_teacher: bool,
    has_advantages: bool,
) -> None:
    """Ids in the vocabulary, a teacher where a valid row is routed, advantages where one is not: one host read."""
    outside = valid & ((target_ids < 0) | (target_ids >= vocab_size))
    flags = torch.stack([outside.any(), (valid & routed).any(), (valid & ~routed).any()]).tolist()
    if flags[0]:
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"target_ids must lie in [0, {vocab_size}) wherever mask is true, got {int(target_ids[row])} at row {row}"
        )
    if flags[1] and not has_teacher:
        raise ValueError("teacher_hidden is required when sdpo_mask routes a valid row to distillation, got None")
    if flags[2] and not has_advantages:
        raise ValueError("advantages is required when a valid row is in the policy branch, got None")


def check_workspace(workspace_bytes: int | None, floor: int) -> None:
    """None, or enough bytes for one row."""
    if workspace_bytes is not None and workspace_bytes < floor:
        raise ValueError(f"workspace_bytes must be at least {floor} to hold one row of logits, got {workspace_bytes}")


def check_teacher_rows(teacher_hidden: Tensor, target_ids: Tensor, routed_rows: int) -> None:
    """Teacher states for every row, or for the ``routed_rows`` first-dimension entries that are routed."""
    full, routed = target_ids.shape, (routed_rows, *target_ids.shape[1:])
    width = teacher_hidden.shape[-1:]
    require_shape(
        "teacher_hidden",
        teacher_hidden,
        [full + width, routed + width],
        "every row, or the routed ones alone",
    )
