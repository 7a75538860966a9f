"""Divergences from a mixture of both models: one family, whose members are four numbers each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from torch import Tensor

from srpo_kernels.checks import refuse_name

if TYPE_CHECKING:
    from typing_extensions import TypeIs

MixtureDivergence = Literal["jsd", "skew_forward_kl", "skew_reverse_kl"]
KL = Literal["forward_kl", "reverse_kl"]
Divergence = Literal[KL, MixtureDivergence]
KLS: tuple[KL, ...] = get_args(KL)
MIXTURE_DIVERGENCES: tuple[MixtureDivergence, ...] = get_args(MixtureDivergence)


class Mixture(NamedTuple):
    """``D = student_weight KL(p || m) + teacher_weight KL(q || m)``, where ``m = student_share p + teacher_share q``.

    ``alpha`` is the share of one of the models, ``alpha_of``; the other one has the rest. The gradient is
    ``dD/dz_v = slope p_v (r_v - E_p[r])`` with ``r_v = log(p_v / m_v) + ratio q_v / m_v``; without a ``student_weight``
    r is ``q_v / m_v`` alone.

    By ``p_v`` the sum is differentiated to ``student_weight log(p_v / m_v) + c q_v / m_v`` with
    ``c = student_weight teacher_share - teacher_weight student_share``.
    """

    alpha: float
    alpha_of: Literal["student", "teacher"]
    student_weight: float
    teacher_weight: float

    @property
    def student_share(self) -> float:
        """That of p in m."""
        return self.alpha if self.alpha_of == "student" else 1.0 - self.alpha

    @property
    def teacher_share(self) -> float:
        """That of q in m."""
        return self.alpha if self.alpha_of == "teacher" else 1.0 - self.alpha

    @property
    def slope(self) -> float:
        """What dD/dz has in front of ``p (r - E_p[r])``."""
        return self.student_weight or self._by_ratio

    @property
    def ratio(self) -> float:
        """What r has in front of ``q / m``: 0 where that cancels, as in jsd."""
        return self._by_ratio / self.slope

    @property
    def _by_ratio(self) -> float:
        return self.student_weight * self.teacher_share - self.teacher_weight * self.student_share

    def divergence(self, student_kl: Tensor | None, teacher_kl: Tensor | None) -> Tensor:
        """D of ``KL(p || m)`` and ``KL(q || m)``; None for one that has no weight."""
        terms = [
            weight * kl
            for weight, kl in ((self.student_weight, student_kl), (self.teacher_weight, teacher_kl))
            if kl is not None
        ]
        return sum(terms[1:], start=terms[0])


def has_mixture(divergence: str | None) -> TypeIs[MixtureDivergence]:
    """Whether this divergence is one from a mixture, which takes a second look at the logits."""
    return divergence in MIXTURE_DIVERGENCES


def mixture_of(divergence: MixtureDivergence, alpha: float) -> Mixture:
    """The mixture of a divergence by name. The skewed ones: DistiLLM (arXiv 2402.03898), section 3.1."""
    match divergence:
        case "jsd":
            return Mixture(alpha, "teacher", 1.0 - alpha, alpha)
        case "skew_forward_kl":
            return Mixture(alpha, "teacher", 0.0, 1.0)
        case "skew_reverse_kl":
            return Mixture(alpha, "student", 1.0, 0.0)
        case unknown:
            refuse_name("divergence", unknown)
