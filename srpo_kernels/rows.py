"""What a row pass takes and returns: the contract between the engine and its backends.

A row pass reads logits ``[n, V]`` (or a slice of the vocabulary) one row at a time and reduces each row to a few
numbers, or turns the buffer into the gradient of the logits. ``rows_torch`` implements it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RowSpec:
    """The options that a row pass needs to know; the same for student and teacher.

    Logits are transformed on arrival: ``softcap * tanh(x * logit_scale / softcap) / temperature``, or
    ``x * logit_scale / temperature`` without a softcap.
    """

    divergence: str | None = None
    alpha: float = 0.5
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    topk: int = 0
    add_tail: bool = False

    @property
    def scale(self) -> float:
        """Slope of the transform at zero: the whole of it when there is no softcap."""
        return self.logit_scale / self.temperature

    @property
    def constant_slope(self) -> float:
        """The transform's slope where it is one number; 1 with a softcap, whose slope the passes apply themselves."""
        return self.scale if self.softcap is None else 1.0

    @property
    def divergence_slope(self) -> float:
        """What dD/dz has in front of ``p (log-ratio - center)``."""
        return 1.0 - self.alpha if self.divergence == "jsd" else 1.0


class RowStats(NamedTuple):
    """The reductions of one model's rows.

    ``log_probs`` ``[n]`` is the target's; ``logsumexp`` ``[n, 1]``; ``entropy`` ``[n]``; ``support_ids`` and
    ``support_log_probs`` ``[n, K]``; ``log_tail`` ``[n]`` is the log of the probability outside the support. The last
    four are None where they were not asked for.
    """

    log_probs: Tensor
    logsumexp: Tensor
    entropy: Tensor | None
    support_ids: Tensor | None
    support_log_probs: Tensor | None
    log_tail: Tensor | None

    @classmethod
    def concatenate(cls, parts: Sequence[RowStats]) -> RowStats:
        """The statistics of consecutive rows."""
        return cls._make(_concatenate(parts))

    def select(self, rows: Tensor) -> RowStats:
        """The statistics of some rows."""
        return type(self)._make(_select(self, rows))


class DivergenceStats(NamedTuple):
    """Both models' reductions and the divergence between them, ``[n]`` or ``[n, 1]`` as in ``RowStats``.

    ``center`` ``[n, 1]`` is what the gradient subtracts from the log-ratio: ``KL(p || m)`` for jsd, the divergence
    itself for reverse_kl, 0 for forward_kl.
    """

    log_probs: Tensor
    logsumexp: Tensor
    entropy: Tensor | None
    teacher_logsumexp: Tensor
    teacher_entropy: Tensor
    divergence: Tensor
    center: Tensor

    @classmethod
    def concatenate(cls, parts: Sequence[DivergenceStats]) -> DivergenceStats:
        """The statistics of consecutive rows."""
        return cls._make(_concatenate(parts))

    def select(self, rows: Tensor) -> DivergenceStats:
        """The statistics of some rows."""
        return type(self)._make(_select(self, rows))


class RowGradients(NamedTuple):
    """Upstream gradients of the rows' statistics, ``[n]`` each; ``divergence`` is None without a teacher."""

    log_probs: Tensor
    entropy: Tensor
    divergence: Tensor | None

    def select(self, rows: Tensor) -> RowGradients:
        """The gradients of some rows."""
        return type(self)._make(_select(self, rows))


def _concatenate(parts: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """Field by field; a field that is None in one part is None in all."""
    columns = [[x for x in column if x is not None] for column in zip(*parts, strict=True)]
    return [torch.cat(column) if column else None for column in columns]


def _select(fields: Sequence[Tensor | None], rows: Tensor) -> list[Tensor | None]:
    return [None if x is None else x[rows] for x in fields]
