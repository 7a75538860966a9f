"""What a row pass takes and returns: the contract between the engine and its backends.

A row pass reads logits ``[n, V]`` (or a slice of the vocabulary) one row at a time and reduces each row to a few
numbers, or turns the buffer into the gradient of the logits. ``rows_torch`` implements it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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


class RowStats(NamedTuple):
    """The reductions of one model's rows.

    ``shift`` and ``sum_exp`` ``[n, 1]`` are the row's maximum and ``sum exp(z - shift)``, ``log_probs`` ``[n]`` the
    target's; ``entropy`` ``[n]``; ``support_ids`` and ``support_log_probs`` ``[n, K]``; ``log_tail`` ``[n]`` the log of
    the probability outside the support. The last four are None where they were not asked for.
    """

    shift: Tensor
    sum_exp: Tensor
    log_probs: Tensor
    entropy: Tensor | None
    support_ids: Tensor | None
    support_log_probs: Tensor | None
    log_tail: Tensor | None


class DivergenceStats(NamedTuple):
    """Both models' reductions and the divergence between them, ``[n]`` or ``[n, 1]`` as in ``RowStats``.

    ``center`` ``[n, 1]`` is what the gradient subtracts from the log-ratio: ``KL(p || m)`` for jsd, the divergence
    itself for reverse_kl, 0 for forward_kl.
    """

    shift: Tensor
    sum_exp: Tensor
    log_probs: Tensor
    entropy: Tensor | None
    teacher_shift: Tensor
    teacher_sum_exp: Tensor
    teacher_entropy: Tensor
    divergence: Tensor
    center: Tensor


class RowGradients(NamedTuple):
    """Upstream gradients of the rows' statistics, ``[n]`` each; ``divergence`` is None without a teacher."""

    log_probs: Tensor
    entropy: Tensor
    divergence: Tensor | None
