"""The checks that a compiled graph cannot make: they run within the operation, most of them on tensor data."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from srpo_kernels.checks import require_counts, require_shape
from srpo_kernels.losses.config import SRPOConfig
from srpo_kernels.rows.dtypes import wide_dtype


class RowChecks(NamedTuple):
    """What a call's values must be: ids in the vocabulary, a teacher where a valid row is routed, advantages elsewhere.

    ``values`` is what the host has to see of them, a vector that it reads along with the rest of what it needs;
    ``normalizers`` names its last ones.
    """

    target_ids: Tensor
    valid: Tensor
    vocab_size: int
    has_teacher: bool
    has_advantages: bool
    normalizers: tuple[str, ...]
    values: Tensor

    @classmethod
    def of(
        cls,
        target_ids: Tensor,
        valid: Tensor,
        routed: Tensor,
        vocab_size: int,
        *,
        has_teacher: bool,
        has_advantages: bool,
        **normalizers: Tensor | None,
    ) -> RowChecks:
        """Of int64 ids, and of the ``normalizers`` that are there."""
        outside = valid & ((target_ids < 0) | (target_ids >= vocab_size))
        flags = outside.any(), (valid & routed).any(), (valid & ~routed).any()
        given = {name: value for name, value in normalizers.items() if value is not None}
        device = target_ids.device
        values = torch.stack([x.to(device, wide_dtype(device)) for x in (*flags, *given.values())])
        return cls(target_ids, valid, vocab_size, has_teacher, has_advantages, tuple(given), values)

    def judge(self, values: list[float]) -> dict[str, float]:
        """The normalizers, of ``values`` as the host has read them. Raises ValueError for what no loss takes."""
        outside, routed, others, *counts = values
        if outside:
            wrong = self.valid & ((self.target_ids < 0) | (self.target_ids >= self.vocab_size))
            row = int(wrong.nonzero()[0])
            wrong_id = int(self.target_ids[row])
            label = ", the label of positions to ignore: mask=target_ids != -100 leaves them out"
            raise ValueError(
                f"target_ids must lie in [0, {self.vocab_size}) wherever mask is true, got {wrong_id} at row {row}"
                f"{label if wrong_id == -100 else ''}"
            )
        if routed and not self.has_teacher:
            raise ValueError("teacher_hidden is required when sdpo_mask routes a valid row to distillation, got None")
        if others and not self.has_advantages:
            raise ValueError("advantages is required when a valid row is in the policy branch, got None")
        numbers = dict(zip(self.normalizers, counts, strict=True))
        require_counts("normalizers", numbers)
        for name in ("token_count", "sequence_count"):
            if numbers.get(name) == 0 and (routed or others):
                raise ValueError(f"normalizers.{name} must count the valid rows of this call too, got 0")
        return numbers


def check_support(name: str, ids: Tensor, vocab_size: int) -> None:
    """Some tokens of rows ``[n, K]``: distinct ids of the vocabulary, negative ones for none. A host read."""
    ordered = ids.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    outside, repeated = torch.stack([(ids >= vocab_size).any(), twice.any()]).tolist()
    if outside:
        raise ValueError(
            f"{name} must be below {vocab_size}, and negative for none, got {int(ids.max())} in a valid row"
        )
    if repeated:
        row = int(twice.any(1).nonzero()[0])
        raise ValueError(f"{name} must be distinct in each row, got {ids[row].tolist()}")


def check_own_divergences(alpha: Tensor | None, clip: Tensor | None, rows: Tensor, divergence: str) -> None:
    """Each row's own numbers of a divergence, where ``rows`` ``[N]`` is true: a host read where there are some."""
    ends = divergence == "jsd"
    checks: list[tuple[str, Tensor, Tensor, str]] = []
    if alpha is not None:
        inside = (alpha >= 0) & (alpha <= 1) if ends else (alpha > 0) & (alpha < 1)
        expected = "in [0, 1]" if ends else f"strictly between 0 and 1 with divergence={divergence!r}"
        checks.append(("divergence_alpha", alpha, inside, expected))
    if clip is not None:
        checks.append(("divergence_clip", clip, clip > 0, "> 0, infinite for no bound,"))
    wrong = [(rows & ~inside).any() for _, _, inside, _ in checks]
    for (name, values, inside, expected), bad in zip(checks, torch.stack(wrong).tolist() if wrong else (), strict=True):
        if bad:
            row = int((rows & ~inside).nonzero()[0])
            raise ValueError(
                f"{name} must be {expected} in every row to distill, got {float(values[row])} at row {row}"
            )


def check_head_ids(ids: Tensor, heads: int) -> None:
    """The teacher heads of the rows that have one, int64 ``[n]``: a host read."""
    if not len(ids):
        return
    lowest, highest = torch.stack([ids.amin(), ids.amax()]).tolist()
    if lowest < 0 or highest >= heads:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(
            f"teacher_head_ids must lie in [0, {heads}), the heads of teacher_weight, wherever a valid row has a "
            f"teacher, got {wrong}"
        )


def check_teacher_head_ids(ids: Tensor, entries: int, routed_entries: int) -> None:
    """Ids for every entry of the first dimension, or for the routed ones."""
    if len(ids) not in (entries, routed_entries):
        raise ValueError(
            f"teacher_head_ids must have {entries} entries, or the {routed_entries} routed ones alone, "
            f"got {list(ids.shape)}"
        )


def warn_of_weights(weight_sum: float, count: int, config: SRPOConfig) -> None:
    """Say that the entropy weights of a whole batch, ``count`` rows, have another mean than 1: one host read."""
    mean = weight_sum / count
    # A teacher that ran twice in low precision has other entropies by some hundredths of a nat.
    if abs(mean - 1.0) > 0.01 * max(1.0, config.dw_beta):
        warnings.warn(
            f"normalizers.dw_log_mean is not that of this batch: its {count} distillation rows, all that "
            f"normalizers.sdpo_count counts, have weights of mean {mean:.3g} in place of 1. Give teacher_stats and "
            "Normalizers.from_batch the config of this loss",
            RuntimeWarning,
            stacklevel=2,
        )


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
