"""What a backend computes of rows of logits: the contract between it and everything above.

A backend reads logits ``[n, V]``, or a slice of the vocabulary, one row at a time, reduces each row to a few numbers,
and turns the buffer into the gradient of the logits. ``torch_rows`` does so on every device, ``kernels`` in Triton.
``passes`` puts together what they return, for a whole vocabulary and for shards of it alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from srpo_kernels.rows.spec import LogitTransform, RowSpec


class Support(NamedTuple):
    """A teacher's likeliest tokens: ``ids``, int64, and its ``log_probs`` there, ``[n, K]``. A negative id is none."""

    ids: Tensor
    log_probs: Tensor


class Holds(Enum):
    """What the student's buffer holds for the gradient that comes next."""

    LOGITS = "logits"
    PROBABILITIES = "probabilities"
    LOG2_PROBABILITIES = "log2 of probabilities"
    DIVERGENCE_GRADIENT = "the divergence's gradient up to a factor"
    # In the teacher's buffer.
    DIVERGENCE_GRADIENT_AND_LOG2 = "the divergence's gradient up to a factor, beside log2 of probabilities"
    NOTHING = "nothing of use"


class Statistics(NamedTuple):
    """The reductions of n rows, of the student and, where there is one, of the teacher; None where not asked for.

    ``log_probs`` ``[n]`` are the target's; ``logsumexp`` ``[n, 1]`` is in the device's widest dtype, since it is as
    large as a logit; ``entropy`` ``[n]``; ``support_ids`` and ``support_log_probs`` ``[n, K]``, of the tokens that the
    models are compared at; ``tail_logsumexp`` ``[n, 1]`` is the log-sum-exp outside the support, as wide.
    ``sampled_ids`` and ``sampled_log_probs`` ``[n, S]`` are those of the tokens that the row was sampled from.
    ``divergence``, ``forward_kl`` and ``reverse_kl`` are ``[n]``; ``mean_log_ratio`` and ``center`` ``[n, 1]``, wide
    too, are what the gradients of reverse_kl and of a divergence that is no KL take away (see ``Coefficients``).
    """

    log_probs: Tensor
    logsumexp: Tensor
    entropy: Tensor | None = None
    support_ids: Tensor | None = None
    support_log_probs: Tensor | None = None
    tail_logsumexp: Tensor | None = None
    teacher_log_probs: Tensor | None = None
    teacher_logsumexp: Tensor | None = None
    teacher_entropy: Tensor | None = None
    teacher_support_log_probs: Tensor | None = None
    teacher_tail_logsumexp: Tensor | None = None
    divergence: Tensor | None = None
    center: Tensor | None = None
    forward_kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    mean_log_ratio: Tensor | None = None
    holds: Holds = Holds.LOGITS
    sampled_ids: Tensor | None = None
    sampled_log_probs: Tensor | None = None

    @property
    def log_tail(self) -> Tensor | None:
        """The log of the student's probability outside the support, ``[n]``."""
        return _log_tail(self.tail_logsumexp, self.logsumexp, self.log_probs)

    @property
    def teacher_log_tail(self) -> Tensor | None:
        """The teacher's outside the same support, ``[n]``."""
        return _log_tail(self.teacher_tail_logsumexp, self.teacher_logsumexp, self.log_probs)

    def with_teacher(self, teacher: Statistics) -> Statistics:
        """These, and the same of the teacher as of a student."""
        return self._replace(
            teacher_log_probs=teacher.log_probs,
            teacher_logsumexp=teacher.logsumexp,
            teacher_entropy=teacher.entropy,
            teacher_support_log_probs=teacher.support_log_probs,
            teacher_tail_logsumexp=teacher.tail_logsumexp,
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Statistics]) -> Statistics:
        """The statistics of consecutive rows; a field that is no tensor is the same in all parts."""
        columns: Any = zip(*parts, strict=True)
        return cls._make(torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in columns)

    def select(self, rows: Tensor | slice) -> Statistics:
        """The statistics of some rows."""
        return type(self)._make(x[rows] if isinstance(x, Tensor) else x for x in self)


def _log_tail(tail: Tensor | None, logsumexp: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tail is None or logsumexp is None else (tail - logsumexp).squeeze(1).to(like.dtype)


class RowGradients(NamedTuple):
    """Upstream gradients of the student's statistics, ``[n]``, ``[n, K]`` and ``[n, S]``; None for those without."""

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    divergence: Tensor | None = None
    logsumexp: Tensor | None = None
    support_log_probs: Tensor | None = None
    log_tail: Tensor | None = None
    forward_kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    sampled_log_probs: Tensor | None = None

    def select(self, rows: Tensor | slice) -> RowGradients:
        """The gradients of some rows."""
        return type(self)._make(None if x is None else x[rows] for x in self)

    def divided_by(self, scale: Tensor | None) -> RowGradients:
        """These over ``scale`` ``[]``, None for 1."""
        return self if scale is None else type(self)._make(None if x is None else x / scale for x in self)

    @property
    def names(self) -> frozenset[str]:
        """The statistics that have a gradient."""
        return frozenset(name for name, x in self._asdict().items() if x is not None)


class Coefficients(NamedTuple):
    """The gradient of the logits as numbers per row, before the slope of the logit transform.

    ``dz_v = (at_ids_k if v = ids_k else p_v (outside + by_log (log p_v + H)))
    + by_forward_kl (p_v - q_v) + by_reverse_kl p_v (r_v - mean_log_ratio) + by_divergence d_v``, with r the log-ratio
    to the teacher; d is the gradient of a divergence that is no KL, of one from a mixture up to ``Mixture.slope``. The
    softmax beside ``outside`` is relative to ``logsumexp`` ``[n, 1]``: that of the row, or of the tokens outside a
    support; H is the ``entropy`` of the statistics. ``ids`` and ``at_ids`` are ``[n, K]``, distinct in a row, the
    others ``[n]``; None is 0.
    """

    ids: Tensor
    at_ids: Tensor
    outside: Tensor
    logsumexp: Tensor
    by_log: Tensor | None
    by_forward_kl: Tensor | None
    by_reverse_kl: Tensor | None
    by_divergence: Tensor | None

    @property
    def compares(self) -> bool:
        """Whether a term reads the teacher's logits."""
        return any(x is not None for x in self[5:])

    def select(self, rows: slice) -> Coefficients:
        """Those of some rows."""
        return Coefficients._make(None if x is None else x[rows] for x in self)


class Dlogits(NamedTuple):
    """The gradient of logits: ``factor * values``, ``[n, 1]`` and ``[n, V]``; a factor of None is 1.

    ``values`` is in the dtype of the products' operands. A factor is left over where it is cheaper to apply it to the
    ``[n, H]`` side of a product than to the logits.
    """

    values: Tensor
    factor: Tensor | None


class Scratch(NamedTuple):
    """What a pass allocates at most: ``blocks`` buffers of ``rows`` rows of logits."""

    blocks: int
    rows: int


class ModelSums(NamedTuple):
    """A part of a row of one model: ``maximum`` unit, and sums of ``e = exp(slope * x)`` with ``x = unit - maximum``.

    ``total`` is of e, ``weighted`` of e x. ``target`` is the unit of the target where it is in this part, else below
    any logit. Of two models side by side, ``gap`` is the sum of e times the student's unit minus the teacher's: the
    student's less that difference where its own maximum is, the teacher's less that of both maxima. The teacher's unit
    where the student's maximum is, is the student's ``anchor``. For a model alone the gap is 0.

    Sums are relative to the maximum because most rows of a language model have hardly anything beside it: what is left
    would be lost to the rounding of the logits themselves.
    """

    maximum: Tensor
    total: Tensor
    weighted: Tensor
    gap: Tensor
    target: Tensor
    anchor: Tensor | None = None


class Rows(Protocol):
    """What a backend implements, for logits ``[n, V_r]`` of the whole vocabulary or of a slice of it.

    Rows may have any stride. Ids are relative to the slice's first one; those outside of ``[0, V_r)`` are another
    slice's. Sums leave the logits as they are, and ``dlogits_`` finds them so; only ``whole_rows`` may leave something
    else, which it names in ``holds``, and a ``dlogits_`` that needs another raises RuntimeError.
    """

    def scratch(self, vocab_size: int, device: torch.device) -> Scratch:
        """What a pass allocates beside its arguments."""

    def slope(self, transform: LogitTransform) -> float:
        """Nats per unit, as this backend rounds it."""

    def sums(
        self,
        logits: Tensor,
        teacher_logits: Tensor | None,
        transform: LogitTransform,
        *,
        target_ids: Tensor,
        teacher_transform: LogitTransform | None = None,
    ) -> list[ModelSums]:
        """The sums of the student and, where there is one, of the teacher, whose units are as large."""

    def units(self, logits: Tensor, transform: LogitTransform) -> Tensor:
        """Raw logits of any shape in units, as a new tensor."""

    def scaled(self, values: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """Gradients of any shape times ``factor`` ``[]``, in ``dtype``; ``values`` are of no use afterwards."""

    def support_sums(
        self, logits: Tensor, transform: LogitTransform, *, target_ids: Tensor, support_ids: Tensor
    ) -> tuple[ModelSums, Tensor]:
        """The sums of the slice without the support ``[n, K]``, and the support's units, LOWEST in other slices."""

    def divergence_sums(
        self, logits: Tensor, teacher_logits: Tensor, stats: Statistics, spec: RowSpec, *, first: bool
    ) -> Tensor:
        """The slice's part of ``center`` and of a divergence that is no KL, ``[n, 2]`` in nats: parts add up.

        ``first`` is true for one of the slices, which adds what belongs to the row as a whole.
        """

    def whole_rows(
        self,
        logits: Tensor,
        teacher_logits: Tensor | None,
        spec: RowSpec,
        *,
        target_ids: Tensor,
        entropy: bool,
        gradient: frozenset[str],
    ) -> Statistics | None:
        """The statistics of whole rows in one go, and in the buffer what ``gradient`` of them needs.

        ``gradient`` names the statistics that will have upstream gradients. None where sums do as well.
        """

    def dlogits_(
        self,
        logits: Tensor,
        teacher_logits: Tensor | None,
        stats: Statistics,
        coefficients: Coefficients,
        spec: RowSpec,
        *,
        out: Tensor,
    ) -> Dlogits:
        """Turn what the buffer holds into dlogits, and consume the teacher's logits.

        ``out`` are the logits, whose place the dlogits take, or rows in another dtype, that of the products.
        """
