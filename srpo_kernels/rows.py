"""What a row pass takes and returns: the contract between the engine and its backends.

A row pass reads logits ``[n, V]`` (or a slice of the vocabulary) one row at a time and reduces each row to a few
numbers, or turns the buffer into the gradient of the logits. ``rows_torch`` implements ``RowPasses`` on every device,
``kernels.passes`` in Triton, and ``engine.sharded`` on logits that lie in several processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

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

    ``log_probs`` ``[n]`` is the target's; ``logsumexp`` ``[n, 1]`` is in the device's widest dtype, since it is as
    large as a logit; ``entropy`` ``[n]``; ``support_ids`` and ``support_log_probs`` ``[n, K]``; ``log_tail`` ``[n]`` is
    the log of the probability outside the support. The last four are None where they were not asked for.
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

    def with_jsd(self, kl: Tensor, teacher_kl: Tensor, spec: RowSpec) -> DivergenceStats:
        """These with the Jensen-Shannon divergence, from ``KL(p || m)`` and ``KL(q || m)`` ``[n]``."""
        return self._replace(divergence=(1.0 - spec.alpha) * kl + spec.alpha * teacher_kl, center=kl[:, None])

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


class Dlogits(NamedTuple):
    """The gradient of logits: ``factor * values``, ``[n, 1]`` and ``[n, V]``; a factor of None is 1.

    ``values`` is in the dtype of the products' operands. A factor is left over where it is cheaper to apply it to the
    ``[n, H]`` side of a product than to the logits.
    """

    values: Tensor
    factor: Tensor | None


class Scratch(NamedTuple):
    """What a row pass allocates at most: ``blocks`` buffers of ``rows`` rows of logits."""

    blocks: int
    rows: int


class RowPasses(Protocol):
    """What a backend implements. Logits are ``[n, V]`` with rows of any stride; a pass may consume what it is given.

    What the statistics' pass leaves in the buffers is for the matching gradient's eyes alone.
    """

    def scratch(self, vocab_size: int, device: torch.device) -> Scratch:
        """What a pass allocates beside its arguments."""

    def row_stats(
        self,
        logits: Tensor,
        spec: RowSpec,
        *,
        target_ids: Tensor,
        support_ids: Tensor | None = None,
        entropy: bool = False,
    ) -> RowStats:
        """Reduce logits to the targets' log-probs, entropy, log-sum-exp and a support's log-probs, per row.

        ``support_ids`` ``[n, K]`` names the support; with None and ``spec.topk`` it is the row's own top-k.
        """

    def divergence_stats(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        spec: RowSpec,
        *,
        target_ids: Tensor,
        gradient: bool,
        entropy: bool = False,
    ) -> DivergenceStats:
        """Reduce both models' logits to their statistics and the divergence.

        ``gradient`` says that ``divergence_gradient_`` follows. ``entropy`` adds the student's entropy; the teacher's
        is always there.
        """

    def log_prob_gradient_(
        self,
        logits: Tensor,
        stats: RowStats,
        spec: RowSpec,
        *,
        ids: Tensor,
        log_probs: Tensor,
        grad_log_probs: Tensor,
        grad_tail: Tensor | None = None,
        grad_entropy: Tensor | None = None,
        dtype: torch.dtype,
    ) -> Dlogits:
        """Turn what ``row_stats`` left in ``logits`` into dlogits, for K log-probs, their tail and the entropy.

        ``ids``, ``log_probs`` and their upstream gradients g are ``[n, K]``: ``dz_v = sum_k g_k (1[v = k] - p_v)``. The
        tail adds ``g_tail (1[v outside] p_v / tail - p_v)``, the entropy ``-g_H p_v (log p_v + H)``, which needs
        ``row_stats(entropy=True)``.
        """

    def divergence_gradient_(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        stats: DivergenceStats,
        spec: RowSpec,
        *,
        grad_divergence: Tensor,
        dtype: torch.dtype,
    ) -> Dlogits:
        """Turn what ``divergence_stats(gradient=True)`` left into dlogits, for ``grad_divergence`` ``[n]``."""

    def slice_gradient_(
        self,
        logits: Tensor,
        teacher_logits: Tensor | None,
        stats: RowStats | DivergenceStats,
        grads: RowGradients,
        spec: RowSpec,
        *,
        target_ids: Tensor,
        first_id: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """Turn fresh logits of the vocabulary slice that starts at ``first_id`` into dlogits, all terms at once.

        The log-sum-exps come from ``stats``, so any slice of the vocabulary can be done on its own.
        """


def support_coefficients(
    grad_log_probs: Tensor, grad_tail: Tensor | None, log_tail: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What multiplies -p at K given ids, and p at all others, ``[n]`` each, for K log-probs and their tail.

    At an id dlogits is ``g_k - total p_k``, outside of them ``outside p_v``: set apart, so that a large tail term never
    has to cancel at an id.
    """
    total = grad_log_probs.sum(1)
    if grad_tail is None or log_tail is None:
        return total, -total
    total = total + grad_tail
    return total, grad_tail * torch.exp(-log_tail) - total


def _concatenate(parts: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """Field by field; a field that is None in one part is None in all."""
    columns = [[x for x in column if x is not None] for column in zip(*parts, strict=True)]
    return [torch.cat(column) if column else None for column in columns]


def _select(fields: Sequence[Tensor | None], rows: Tensor) -> list[Tensor | None]:
    return [None if x is None else x[rows] for x in fields]
