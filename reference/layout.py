"""How rows belong to sequences, to a teacher's rows, and to the reduction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import policy


def per_row(value: Tensor, target_ids: Tensor) -> Tensor:
    """A per-sequence ``[B]`` value repeated over its tokens; a per-token value as it is."""
    return value if value.shape == target_ids.shape else value[:, None].expand_as(target_ids)


def resolve_sequence_ids(sequence_ids: Tensor | None, target_ids: Tensor, config: Any) -> Tensor:
    """Which sequence each row belongs to: given for packed rows, the row number of ``[B, T]`` otherwise."""
    if sequence_ids is not None:
        return sequence_ids
    if target_ids.ndim == 2:
        return per_row(torch.arange(len(target_ids), device=target_ids.device), target_ids)
    if config.loss_type in policy.SEQUENCE_LOSSES or config.reduction not in ("token", "token_sum"):
        raise ValueError(f"sequence_ids: packed rows need them for {config.loss_type=}, {config.reduction=}")
    return torch.zeros_like(target_ids)


def teacher_rows(teacher_hidden: Tensor, routed: Tensor, rows: Tensor) -> Tensor:
    """The teacher's hidden states at ``rows``, from all rows or from the routed sequences alone, in order."""
    if teacher_hidden.shape[:-1] == routed.shape:
        return teacher_hidden[rows]
    routed_sequences = routed.any(dim=1) if routed.ndim == 2 else routed
    return teacher_hidden[rows[routed_sequences]]


def head_ids(ids: Tensor, routed: Tensor, rows: Tensor) -> Tensor:
    """Which head of the teacher's each of ``rows`` has, from ids of all rows or sequences, or of the routed alone."""
    if len(ids) == len(routed):
        return per_row(ids, routed)[rows]
    routed_sequences = routed.any(dim=1) if routed.ndim == 2 else routed
    rows = rows[routed_sequences]
    return per_row(ids, rows)[rows]


def reduction_factors(valid: Tensor, sequence_ids: Tensor, normalizers: Any, config: Any, dtype: torch.dtype) -> Tensor:
    """What multiplies each valid token's loss, in either branch: they share one denominator. Paper 3.3.

    ``token``: ``1 / N_tokens``, every valid token of either branch; ``sequence``:
    ``1 / (len_i · n_sequences)``; ``constant``: ``1 / (n_sequences · max_length)``; ``sequence_sum``:
    ``1 / n_sequences``; ``token_sum``: 1. Sequences are those with a valid token. Global counts come from
    ``normalizers`` where given.
    """
    if config.reduction == "token_sum":
        return torch.ones(valid.shape, dtype=dtype, device=valid.device)
    if config.reduction == "token":
        tokens: Tensor = valid.sum() if normalizers is None else normalizers.token_count
        return torch.ones(valid.shape, dtype=dtype, device=valid.device) / tokens
    sequences = len(torch.unique(sequence_ids[valid])) if normalizers is None else normalizers.sequence_count
    lengths = policy.sequence_sum(valid.to(dtype), sequence_ids)
    if config.reduction == "constant":
        lengths = torch.full_like(lengths, config.max_length)
    elif config.reduction == "sequence_sum":
        lengths = torch.ones_like(lengths)
    elif config.reduction != "sequence":
        raise ValueError(f"reduction: unknown, {config.reduction!r}")
    return (lengths * sequences).reciprocal()
