"""SRPOConfig: every option of the loss, checked when it is constructed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

LossType = Literal["grpo", "cispo", "gspo", "sapo", "reinforce"]
KLType = Literal["k1", "k2", "k3"]
Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
DistillationMode = Literal["full", "topk", "sampled"]
Reduction = Literal["token", "sequence", "constant"]

LOSS_TYPES: tuple[LossType, ...] = get_args(LossType)
KL_TYPES: tuple[KLType, ...] = get_args(KLType)
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
DISTILLATION_MODES: tuple[DistillationMode, ...] = get_args(DistillationMode)
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)


@dataclass(frozen=True, kw_only=True)
class SRPOConfig:
    """The options of the SRPO loss. The defaults are the paper's, with the full vocabulary in place of its top 100.

    Policy branch, with ``rho = exp(log_probs - old_log_probs)`` and the advantage ``A``:

    - ``loss_type``: ``"grpo"`` (clipped ratio), ``"cispo"`` (clipped, detached ratio as a weight), ``"gspo"`` (``"grpo"``
      with one ratio per sequence), ``"sapo"`` (sigmoid gate in place of the clip) or ``"reinforce"`` (no ratio).
    - ``epsilon_low``, ``epsilon_high``: the ratio is clipped to ``[1 - epsilon_low, 1 + epsilon_high]``; at least 0.
    - ``delta``: upper bound of the unclipped ratio as well; positive, None for none. grpo and gspo only.
    - ``dual_clip``: bound ``c`` of the loss where ``A < 0``, which is at most ``-c A``; above 1, None for none. grpo and
      gspo only.
    - ``log_ratio_clamp``: the log-ratio is clamped to plus or minus this, in nats; positive, None for none.
    - ``kl_coef``: weight of the divergence from ``ref_log_probs``; at least 0.
    - ``kl_type``: its estimator, with ``d = log_probs - ref_log_probs``: ``"k1"`` is ``d``, ``"k2"`` is ``d^2 / 2``,
      ``"k3"`` is ``exp(-d) + d - 1``.
    - ``entropy_coef``: weight of the entropy bonus ``H(p)``, which is subtracted from the loss; either sign.

    Distillation branch, from the student ``p`` to the teacher ``q``:

    - ``divergence``: ``"forward_kl"`` is ``KL(q || p)``, ``"reverse_kl"`` is ``KL(p || q)``, ``"jsd"`` is
      ``(1 - alpha) KL(p || m) + alpha KL(q || m)`` with ``m = (1 - alpha) p + alpha q``.
    - ``alpha``: the weight of the teacher in ``"jsd"``, strictly between 0 and 1; the other two do not read it.
    - ``distillation_mode``: ``"full"`` compares whole vocabularies; ``"topk"`` the student's ``topk`` likeliest tokens;
      ``"sampled"`` the sampled token alone.
    - ``topk``: how many tokens ``"topk"`` compares; at least 1, a larger vocabulary than there is means all of it.
    - ``add_tail``: whether ``"topk"`` puts the remaining probability in one more bucket, or renormalises without it.
    - ``distillation_is_clip``: upper bound of the detached importance weight ``exp(log_probs - old_log_probs)``;
      positive, None for no importance weight.
    - ``dw_beta``: strength of the entropy-aware weight ``exp(-dw_beta H(q))``, per nat; at least 0, 0 weighs all alike.

    Both branches:

    - ``temperature``, ``logit_scale``, ``softcap``: the logits of student and teacher become
      ``softcap * tanh(x * logit_scale / softcap) / temperature``; positive, None for no softcap.
    - ``reduction``: ``"token"`` divides by the valid tokens of both branches, ``"sequence"`` takes the mean of each
      sequence and then of the sequences, ``"constant"`` divides by sequences times ``max_length``.
    - ``max_length``: the constant of ``"constant"``, in tokens; given with it and with nothing else.
    - ``count_inactive``: also compute the log-probabilities of tokens that cannot move a weight, for the metrics.

    Every number is finite. A value of the wrong type raises TypeError; a value out of its range, an unknown name or two
    options that contradict each other raise ValueError.

    Source: SRPO (arXiv 2604.02288), sections 3.1 to 3.3 and appendix B.
    """

    loss_type: LossType = "grpo"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.28
    delta: float | None = None
    dual_clip: float | None = None
    log_ratio_clamp: float | None = 20.0
    kl_coef: float = 0.0
    kl_type: KLType = "k3"
    entropy_coef: float = 0.0
    divergence: Divergence = "jsd"
    alpha: float = 0.5
    distillation_mode: DistillationMode = "full"
    topk: int = 100
    add_tail: bool = True
    distillation_is_clip: float | None = 2.0
    dw_beta: float = 1.0
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    reduction: Reduction = "token"
    max_length: int | None = None
    count_inactive: bool = False

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            _require_choice(name, getattr(self, name), choices)
        for name, (expected, holds) in _RANGES.items():
            require_number(name, getattr(self, name), expected, holds)
        for name, (expected, holds) in _OPTIONAL_RANGES.items():
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), f"{expected}, or None", holds)
        for name in ("add_tail", "count_inactive"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        _require_count("topk", self.topk)
        if self.max_length is not None:
            _require_count("max_length", self.max_length)
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        if self.divergence == "jsd" and not 0 < self.alpha < 1:
            raise ValueError(
                f"alpha must be strictly between 0 and 1 with divergence='jsd', got {self.alpha!r}; "
                "SRPOConfig.from_alpha maps 0 to 'forward_kl' and 1 to 'reverse_kl'"
            )
        for name in ("delta", "dual_clip"):
            if getattr(self, name) is not None and self.loss_type not in ("grpo", "gspo"):
                raise ValueError(
                    f"{name} must be None unless loss_type is 'grpo' or 'gspo', "
                    f"got {getattr(self, name)!r} with loss_type={self.loss_type!r}"
                )
        if (self.max_length is not None) != (self.reduction == "constant"):
            raise ValueError(
                "max_length must be given with reduction='constant' and be None otherwise, "
                f"got {self.max_length!r} with reduction={self.reduction!r}"
            )

    @classmethod
    def from_alpha(cls, alpha: float, **options: Any) -> SRPOConfig:
        """The config whose divergence is named by one number, as in SDPO and TRL.

        ``alpha`` is 0 for ``"forward_kl"``, 1 for ``"reverse_kl"``, and the weight of the teacher in ``"jsd"`` between
        them. ``options`` are the other fields. Raises as the constructor does.
        """
        require_number("alpha", alpha, *_RANGES["alpha"])
        divergence: Divergence = "forward_kl" if alpha == 0 else "reverse_kl" if alpha == 1 else "jsd"
        return cls(divergence=divergence, alpha=alpha, **options)


def require_number(name: str, value: object, expected: str, holds: Callable[[float], bool]) -> None:
    """Raise TypeError unless ``value`` is an int or a float, ValueError unless it is finite and ``holds``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number {expected}, got {value!r}")
    if not (math.isfinite(value) and holds(value)):
        raise ValueError(f"{name} must be a finite number {expected}, got {value!r}")


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {choices}, got {value!r}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _require_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int >= 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be an int >= 1, got {value!r}")


_Range = tuple[str, Callable[[float], bool]]

_POSITIVE: _Range = ("> 0", lambda value: value > 0)
_NON_NEGATIVE: _Range = (">= 0", lambda value: value >= 0)

_CHOICES: dict[str, tuple[str, ...]] = {
    "loss_type": LOSS_TYPES,
    "kl_type": KL_TYPES,
    "divergence": DIVERGENCES,
    "distillation_mode": DISTILLATION_MODES,
    "reduction": REDUCTIONS,
}
_RANGES: dict[str, _Range] = {
    "epsilon_low": _NON_NEGATIVE,
    "epsilon_high": _NON_NEGATIVE,
    "kl_coef": _NON_NEGATIVE,
    "entropy_coef": ("of either sign", lambda value: True),
    "alpha": ("in [0, 1]", lambda value: 0 <= value <= 1),
    "dw_beta": _NON_NEGATIVE,
    "temperature": _POSITIVE,
    "logit_scale": _POSITIVE,
}
_OPTIONAL_RANGES: dict[str, _Range] = {
    "delta": _POSITIVE,
    "dual_clip": ("> 1", lambda value: value > 1),
    "log_ratio_clamp": _POSITIVE,
    "distillation_is_clip": _POSITIVE,
    "softcap": _POSITIVE,
}
