"""What is computed of a row: the logit transform, a divergence, the likeliest tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from srpo_kernels.checks import refuse_name
from srpo_kernels.rows.entries import EntryDivergence
from srpo_kernels.rows.mixture import KL, Divergence, Mixture, has_mixture, mixture_of

# Whose likeliest tokens a top-k is.
TopkOf = Literal["student", "teacher"]
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)

# Stands for minus infinity: 0 * LOWEST is 0. A logit below it counts as this much, in every pass and for both models:
# a token that both exclude adds nothing to a divergence. The logit of a token that is in another part of its row, too.
LOWEST = -1e30


class LogitTransform(NamedTuple):
    """``softcap * tanh(x * logit_scale / softcap) / temperature``, or ``x * logit_scale / temperature``.

    As a ``teacher_transform`` that of another model. A *unit* is what a backend counts logits in: a raw logit, or the
    tanh of one with a softcap.
    """

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def scale(self) -> float:
        """Slope at zero: the whole of it when there is no softcap."""
        return self.logit_scale / self.temperature

    @property
    def constant_slope(self) -> float:
        """The slope where it is one number; 1 with a softcap, whose slope the backends apply themselves."""
        return self.scale if self.softcap is None else 1.0

    @property
    def nats_per_unit(self) -> float:
        """What a unit stands for."""
        return self.scale if self.softcap is None else self.softcap / self.temperature


_IDENTITY = LogitTransform()


@dataclass(frozen=True)
class RowSpec:
    """What is computed of a row, beside its target's log-prob; ``own_teacher`` is the teacher's own transform, if any.

    ``divergence`` None: none, with a teacher too; ``clip`` bounds its entries; ``entries`` is that of given rows, in
    the place of ``alpha`` and ``clip``: see ``of_rows``. ``kls`` are wanted beside it. ``topk`` > 0: log-probs of the
    likeliest tokens of ``topk_of``.
    """

    transform: LogitTransform = _IDENTITY
    divergence: Divergence | None = None
    alpha: float = 0.5
    topk: int = 0
    add_tail: bool = False
    topk_of: TopkOf = "student"
    clip: float | None = None
    kls: frozenset[KL] = frozenset()
    entries: EntryDivergence | None = None
    own_teacher: LogitTransform | None = None

    @property
    def teacher_transform(self) -> LogitTransform:
        """Of the teacher's logits in a buffer: where its transform is its own, they are in the student's units."""
        return self.transform if self.own_teacher is None else LogitTransform(1.0, self.transform.nats_per_unit)

    def of_rows(self, rows: Tensor, alpha: Tensor | None = None, clip: Tensor | None = None) -> RowSpec:
        """For n ``rows`` that may have an ``alpha`` and a ``clip`` ``[n]`` of their own."""
        if self.divergence is None or (alpha is None and clip is None and self.clip is None):
            return self
        own = self.alpha if alpha is None else alpha, self.clip if clip is None else clip
        return replace(self, entries=EntryDivergence.of(self.divergence, *own, rows))

    @property
    def mixture(self) -> Mixture | None:
        """What the divergence compares with, where that is one mixture of both models for all rows."""
        if self.entries is not None or not has_mixture(self.divergence):
            return None
        return mixture_of(self.divergence, self.alpha)

    @property
    def kl(self) -> KL | None:
        """Which KL the divergence is, None where it takes a second look at the logits."""
        if self.entries is not None or self.divergence is None or has_mixture(self.divergence):
            return None
        match self.divergence:
            case "forward_kl" | "reverse_kl" as kl:
                return kl
            case unknown:
                refuse_name("divergence", unknown)

    @property
    def all_kls(self) -> frozenset[KL]:
        """The KLs that are wanted, as the divergence or beside it."""
        return self.kls if self.kl is None else self.kls | {self.kl}

    @property
    def compares(self) -> bool:
        """Whether both models' logits are wanted side by side."""
        return self.divergence is not None or bool(self.kls)
