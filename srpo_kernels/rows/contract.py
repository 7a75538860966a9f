"""What a row pass takes and returns: the contract between the engine and its backends.

A row pass reads logits ``[n, V]`` (or a slice of the vocabulary) one row at a time and reduces each row to a few
numbers, or turns the buffer into the gradient of the logits. ``rows_torch`` implements ``RowPasses`` on every device,
``kernels.passes`` in Triton, and ``engine.sharded`` on logits that lie in several processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)

# Stands for minus infinity: 0 * LOWEST is 0. A logit below it counts as this much, in every pass and for both models:
# a token that both exclude adds nothing to a divergence. The logit of a token that is in another part of its row, too.
LOWEST = -1e30


class Holds(Enum):
    """What a statistics' pass left in the student's buffer, for the gradient's pass that comes next."""

    LOGITS = "logits"
    PROBABILITIES = "probabilities"
    LOG2_PROBABILITIES = "log2 of probabilities"
    DIVERGENCE_GRADIENT = "the divergence's gradient up to a factor"
    NOTHING = "nothing of use"


@dataclass(frozen=True, kw_only=True)
class RowSpec:
    """The options that a row pass needs to know; the same for student and teacher.

    Logits are transformed on arrival: ``softcap * tanh(x * logit_scale / softcap) / temperature``, or
    ``x * logit_scale / temperature`` without a softcap.
    """

    divergence: Divergence | None = None
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
    large as a logit; ``entropy`` ``[n]``; ``support_ids`` and ``support_log_probs`` ``[n, K]``; ``tail_logsumexp``
    ``[n, 1]`` is the log-sum-exp outside the support, as wide. These four are None where they were not asked for.
    """

    log_probs: Tensor
    logsumexp: Tensor
    entropy: Tensor | None
    support_ids: Tensor | None
    support_log_probs: Tensor | None
    tail_logsumexp: Tensor | None
    holds: Holds = Holds.LOGITS

    @property
    def log_tail(self) -> Tensor | None:
        """The log of the probability outside the support, ``[n]``."""
        if self.tail_logsumexp is None:
            return None
        return (self.tail_logsumexp - self.logsumexp).squeeze(1).to(self.log_probs.dtype)

    @classmethod
    def concatenate(cls, parts: Sequence[RowStats]) -> RowStats:
        """The statistics of consecutive rows."""
        return cls._make(_concatenate(parts))

    def select(self, rows: Tensor) -> RowStats:
        """The statistics of some rows."""
        return type(self)._make(_select(self, rows))


class DivergenceStats(NamedTuple):
    """Both models' reductions and the divergence between them, ``[n]`` or ``[n, 1]`` as in ``RowStats``.

    ``center`` ``[n, 1]``, as wide as the log-sum-exps, is what the gradient subtracts from the log-ratio:
    ``KL(p || m)`` for jsd, the divergence itself for reverse_kl, 0 for forward_kl.
    """

    log_probs: Tensor
    logsumexp: Tensor
    entropy: Tensor | None
    teacher_logsumexp: Tensor
    teacher_entropy: Tensor
    divergence: Tensor
    center: Tensor
    holds: Holds = Holds.LOGITS

    def with_jsd(self, kl: Tensor, teacher_kl: Tensor, spec: RowSpec) -> DivergenceStats:
        """These with the Jensen-Shannon divergence, from ``KL(p || m)`` and ``KL(q || m)`` ``[n]``."""
        jsd = (1.0 - spec.alpha) * kl + spec.alpha * teacher_kl
        # Rounding can take it below 0.
        return self._replace(divergence=jsd.clamp_min(0.0), center=kl[:, None].to(self.logsumexp.dtype))

    @classmethod
    def concatenate(cls, parts: Sequence[DivergenceStats]) -> DivergenceStats:
        """The statistics of consecutive rows."""
        return cls._make(_concatenate(parts))

    def select(self, rows: Tensor | slice) -> DivergenceStats:
        """The statistics of some rows."""
        return type(self)._make(_select(self, rows))


class RowGradients(NamedTuple):
    """Upstream gradients of the rows' statistics, ``[n]`` each; ``divergence`` is None without a teacher."""

    log_probs: Tensor
    entropy: Tensor
    divergence: Tensor | None

    def select(self, rows: Tensor | slice) -> RowGradients:
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

    What the statistics' pass leaves in the student's buffer is for the matching gradient's eyes alone, and is named in
    ``holds``: a gradient that needs something else raises RuntimeError.
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
        ``row_stats(entropy=True)`` and goes with no tail.
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


def support_coefficients(
    log_probs: Tensor, grad_log_probs: Tensor, grad_tail: Tensor | None, log_tail: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``dz`` at K given ids, ``[n, K]``, and what multiplies a softmax elsewhere, ``[n]``, for K log-probs and a tail.

    At an id it is ``g_k - total p_k``, from the log-prob: exactly 0 for the one token of a row that has no other.
    Elsewhere it is ``-total p_v``, or with a tail ``(g_tail - total tail) p_v / tail``: ``p_v / tail`` is the softmax
    of the tail alone, whose log-sum-exp is ``tail_logsumexp``, and is there where ``p_v`` has underflown.
    """
    total = grad_log_probs.sum(1)
    outside = -total
    if grad_tail is not None and log_tail is not None:
        total = total + grad_tail
        outside = grad_tail - total * log_tail.exp()
    return grad_log_probs - total[:, None] * log_probs.exp(), outside


def _concatenate(parts: Sequence[Sequence[Any]]) -> list[Any]:
    """Field by field; a field that is no tensor is the same in all parts."""
    columns = zip(*parts, strict=True)
    return [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in columns]


def _select(fields: Sequence[Any], rows: Tensor | slice) -> list[Any]:
    return [x[rows] if isinstance(x, Tensor) else x for x in fields]
