"""What each option of ``SRPOConfig`` can be, and the errors for what it cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from srpo_kernels.checks import require_number
from srpo_kernels.losses.log_ratio import KLType
from srpo_kernels.losses.policy import POLICY_LOSSES
from srpo_kernels.rows.mixture import has_mixture
from srpo_kernels.rows.spec import DIVERGENCES, LogitTransform, TopkOf

DistillationMode = Literal["full", "topk", "sampled"]
Reduction = Literal["token", "sequence", "constant", "token_sum", "sequence_sum"]

# Those of this library; ``register_policy_loss`` adds to the registry, not to these.
LOSS_TYPES = tuple(POLICY_LOSSES)
KL_TYPES: tuple[KLType, ...] = get_args(KLType)
DISTILLATION_MODES: tuple[DistillationMode, ...] = get_args(DistillationMode)
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
TOPK_OF: tuple[TopkOf, ...] = get_args(TopkOf)


def require_option(name: str, value: Any) -> None:
    """Raise TypeError or ValueError unless the named option, a choice or a number, can have this value."""
    if name == "loss_type":
        require_choice(name, value, tuple(POLICY_LOSSES))
    elif name in CHOICES:
        require_choice(name, value, CHOICES[name])
    elif name in RANGES:
        require_number(name, value, *RANGES[name])
    elif name == "teacher_transform":
        _require_own_transform(value)
    elif value is not None:
        expected, holds = OPTIONAL_RANGES[name]
        require_number(name, value, f"{expected}, or None", holds)


def _require_own_transform(value: Any) -> None:
    """Raise TypeError or ValueError unless this is None or a logit transform."""
    if value is None:
        return
    if not isinstance(value, LogitTransform):
        raise TypeError(f"teacher_transform must be a LogitTransform or None, got {type(value).__name__}")
    for name in ("temperature", "logit_scale"):
        require_number(f"teacher_transform.{name}", getattr(value, name), *RANGES[name])
    if value.softcap is not None:
        expected, holds = OPTIONAL_RANGES["softcap"]
        require_number("teacher_transform.softcap", value.softcap, f"{expected}, or None", holds)


def require_mixture(divergence: str, alpha: float) -> None:
    """Raise ValueError where the mixture would be one of the two models."""
    if has_mixture(divergence) and not 0 < alpha < 1:
        raise ValueError(
            f"alpha must be strictly between 0 and 1 with divergence={divergence!r}, got {alpha!r}; "
            "SRPOConfig.from_alpha maps 0 to 'forward_kl' and 1 to 'reverse_kl'"
        )


def require_transform(
    temperature: float, logit_scale: float, softcap: float | None, teacher: LogitTransform | None = None
) -> None:
    """Raise ValueError where float32 does not hold what the kernels multiply logits by; ``teacher`` has its own."""
    _require_factors("", temperature, logit_scale, softcap)
    if teacher is not None:
        _require_factors("teacher_transform.", *teacher)
        own = LogitTransform(temperature, logit_scale, softcap)
        _require_factor("the teacher's largest slope over the student's", teacher.nats_per_unit / own.nats_per_unit)


def _require_factors(prefix: str, temperature: float, logit_scale: float, softcap: float | None) -> None:
    cap = logit_scale if softcap is None else softcap
    factors = {
        "temperature": temperature,
        "logit_scale": logit_scale,
        "softcap": cap,
        "logit_scale / temperature": logit_scale / temperature,
        "softcap / temperature": cap / temperature,
        "logit_scale / softcap": logit_scale / cap,
    }
    for name, factor in factors.items():
        _require_factor(prefix + name, factor)


def _require_factor(name: str, factor: float) -> None:
    # A factor of 10 is left for a change of base.
    if not 1e-37 <= factor <= 1e37:
        raise ValueError(f"{name} must be in [1e-37, 1e37], the range of float32, got {factor!r}")


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise TypeError or ValueError unless ``value`` is one of these names."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {choices}, got {value!r}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


_Range = tuple[str, Callable[[float], bool]]

ANY: _Range = ("of either sign", lambda value: True)
_POSITIVE: _Range = ("> 0", lambda value: value > 0)
_NON_NEGATIVE: _Range = (">= 0", lambda value: value >= 0)

CHOICES: dict[str, tuple[str, ...]] = {
    "kl_type": KL_TYPES,
    "divergence": DIVERGENCES,
    "distillation_mode": DISTILLATION_MODES,
    "reduction": REDUCTIONS,
    "topk_of": TOPK_OF,
}
RANGES: dict[str, _Range] = {
    "epsilon_low": _NON_NEGATIVE,
    "epsilon_high": _NON_NEGATIVE,
    "kl_coef": _NON_NEGATIVE,
    "entropy_coef": ANY,
    "alpha": ("in [0, 1]", lambda value: 0 <= value <= 1),
    "dw_beta": _NON_NEGATIVE,
    "temperature": _POSITIVE,
    "logit_scale": _POSITIVE,
}
OPTIONAL_RANGES: dict[str, _Range] = {
    "delta": _POSITIVE,
    "dual_clip": ("> 1", lambda value: value > 1),
    "log_ratio_clamp": _POSITIVE,
    "distillation_is_clip": _POSITIVE,
    "divergence_clip": _POSITIVE,
    "softcap": _POSITIVE,
}
