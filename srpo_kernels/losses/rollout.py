"""Corrections for rollouts that another policy than the trained one has sampled: weights and masks of rows.

The log-ratio is ``old_log_probs - rollout_log_probs``: what the trainer says of a token against what the engine that
sampled it said. All of it is detached, and tested in log space, where nothing overflows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from srpo_kernels.checks import require_number
from srpo_kernels.losses.log_ratio import LARGEST_LOG_RATIO
from srpo_kernels.losses.options import require_choice
from srpo_kernels.losses.sequences import Sequences

RolloutLevel = Literal["token", "sequence", "geometric"]
Outside = Literal["clamp", "zero"]
MaskName = Literal[
    "token_k1", "token_k2", "token_k3",
    "seq_sum_k1", "seq_sum_k2", "seq_sum_k3",
    "seq_mean_k1", "seq_mean_k2", "seq_mean_k3",
    "seq_max_k1", "seq_max_k2", "seq_max_k3",
]  # fmt: skip

ROLLOUT_LEVELS: tuple[RolloutLevel, ...] = get_args(RolloutLevel)
OUTSIDE: tuple[Outside, ...] = get_args(Outside)
MASKS: tuple[MaskName, ...] = get_args(MaskName)

# Of a weight that has no bound of its own.
_LARGEST_LOG_WEIGHT = 20.0
# From a statistic's name to the least and the largest value that a row may have of it, None for no bound.
Band = tuple[float | None, float | None]


@dataclass(frozen=True, kw_only=True)
class RolloutCorrection:
    """How rows of another policy are weighted and left out; ``l = old_log_probs - rollout_log_probs`` per token.

    A row's weight multiplies the losses of both branches, without gradient; a row that is left out has the weight 0,
    and stays in the denominator. KL and entropy terms have no weight. Tokens whose ``rollout_log_probs`` are NaN, which
    the engine could not score, count with ``l = 0``.

    Args:
        level: the weight is ``exp(l)`` of the ``"token"``, ``exp(sum l)`` of the ``"sequence"``, or ``exp(mean l)``,
            ``"geometric"``. None: 1, for masks alone.
        weight_min: least weight; > 0. None: ``exp(-20)``.
        weight_max: largest weight; > 0. None: ``exp(20)``, beyond which a gradient could leave fp32.
        outside: what is beyond them: ``"clamp"`` is held there (truncated importance sampling), ``"zero"`` is left
            out (masked importance sampling; by token IcePop, arXiv 2510.18855).
        masks: what a row must have to stay: from a name to its largest value, or to its least and largest one, None for
            no bound. ``"token_k1"`` is l, ``"token_k2"`` ``l**2 / 2``, ``"token_k3"`` ``exp(l) - l - 1``, in nats;
            ``"seq_sum_"``, ``"seq_mean_"`` and ``"seq_max_"`` take these over a sequence, all of which stays or goes.
            ``"seq_mean_k1"`` is the geometric mask; ``"seq_max_k3"`` and ``"seq_mean_k3"`` estimate those of Trust
            Region Masking (arXiv 2512.23075). Kept as sorted triples.
        off_policy_threshold: policy rows with a negative advantage are left out where the mean of
            ``rollout_log_probs - log_probs`` over the policy rows of their sequence, in the current policy, is larger
            (nats); >= 0. Off-policy sequence masking of DeepSeek-V3.2 (arXiv 2512.02556). None: none are.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: an unknown name, a value out of its range, or bounds without anything between them.
    """

    level: RolloutLevel | None = "token"
    weight_min: float | None = None
    weight_max: float | None = 2.0
    outside: Outside = "clamp"
    masks: Mapping[str, Any] | tuple[tuple[str, float | None, float | None], ...] = ()
    off_policy_threshold: float | None = None

    def __post_init__(self) -> None:
        if self.level is not None:
            require_choice("level", self.level, ROLLOUT_LEVELS)
        require_choice("outside", self.outside, OUTSIDE)
        for name in ("weight_min", "weight_max"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), "> 0, or None", lambda value: value > 0)
        _require_order("weight_min and weight_max", (self.weight_min, self.weight_max))
        if self.off_policy_threshold is not None:
            require_number("off_policy_threshold", self.off_policy_threshold, ">= 0, or None", lambda value: value >= 0)
        object.__setattr__(self, "masks", _triples(self.masks))

    @classmethod
    def tis(cls, weight_max: float = 2.0, *, level: RolloutLevel = "token") -> RolloutCorrection:
        """Truncated importance sampling: weights of at most ``weight_max``."""
        return cls(level=level, weight_max=weight_max)

    @classmethod
    def mis(cls, weight_max: float = 2.0, *, level: RolloutLevel = "token") -> RolloutCorrection:
        """Masked importance sampling: rows of a larger weight are left out."""
        return cls(level=level, weight_max=weight_max, outside="zero")

    @classmethod
    def icepop(cls, weight_min: float = 0.5, weight_max: float = 5.0) -> RolloutCorrection:
        """IcePop (arXiv 2510.18855): tokens whose weight is out of the band are left out."""
        return cls(weight_min=weight_min, weight_max=weight_max, outside="zero")

    @property
    def by_sequence(self) -> bool:
        """Whether a row's weight depends on others of its sequence."""
        return self.level in ("sequence", "geometric") or any(band[0].startswith("seq_") for band in self.bands)

    @property
    def bands(self) -> tuple[tuple[str, float | None, float | None], ...]:
        """``masks`` as they are kept."""
        assert isinstance(self.masks, tuple)
        return self.masks

    def encode(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        return {**vars(self), "masks": [list(band) for band in self.bands]}

    @classmethod
    def decode(cls, fields: Mapping[str, Any]) -> RolloutCorrection:
        """The correction whose ``encode()`` this is."""
        return cls(**{**fields, "masks": tuple(tuple(mask) for mask in fields["masks"])})


class RolloutWeights(NamedTuple):
    """Of rows ``[n]``: the weights, and which were held at a bound of theirs, bool."""

    weights: Tensor
    clipped: Tensor


def rollout_weights(log_ratio: Tensor, sequences: Sequences | None, correction: RolloutCorrection) -> RolloutWeights:
    """The weights of rows with these log-ratios; ``sequences`` are needed where they are ``by_sequence``."""
    log_ratio = log_ratio.masked_fill(log_ratio.isnan(), 0.0)
    log_weight, low, high = torch.zeros_like(log_ratio), -_LARGEST_LOG_WEIGHT, _LARGEST_LOG_WEIGHT
    if correction.level is not None:
        log_weight = _over_scope(correction.level, log_ratio, sequences)
        low = low if correction.weight_min is None else math.log(correction.weight_min)
        high = high if correction.weight_max is None else math.log(correction.weight_max)
    outside = ~_between(log_weight, (low, high))
    kept = torch.ones_like(outside)
    for name, *bounds in correction.bands:
        kept &= _between(_statistic(name, log_ratio, sequences), (bounds[0], bounds[1]))
    if correction.outside == "zero":
        kept &= ~outside
    return RolloutWeights(log_weight.clamp(low, high).exp().masked_fill(~kept, 0.0), outside & kept)


def without_off_policy_rows(
    weights: RolloutWeights,
    log_ratio: Tensor,
    advantages: Tensor,
    sequences: Sequences | None,
    correction: RolloutCorrection,
) -> RolloutWeights:
    """The weights of policy rows, 0 where off-policy sequence masking leaves them out.

    ``log_ratio`` is that of the current policy to the rollout's.
    """
    if correction.off_policy_threshold is None:
        return weights
    assert sequences is not None
    gap = sequences.mean(-log_ratio.masked_fill(log_ratio.isnan(), 0.0))
    dropped = (advantages < 0) & (gap > correction.off_policy_threshold)
    return RolloutWeights(weights.weights.masked_fill(dropped, 0.0), weights.clipped & ~dropped)


def _statistic(name: str, log_ratio: Tensor, sequences: Sequences | None) -> Tensor:
    """What a mask of this name looks at, of each row or of its sequence."""
    scope, estimator = name.rsplit("_", 1)
    match estimator:
        case "k1":
            values = log_ratio
        case "k2":
            values = 0.5 * log_ratio.square()
        case "k3":
            bounded = log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
            values = torch.expm1(bounded) - bounded
        case _:
            raise ValueError(f"masks must be among {MASKS}, got {name!r}")
    return _over_scope(scope, values, sequences)


def _over_scope(scope: str, values: Tensor, sequences: Sequences | None) -> Tensor:
    """Each row's value, or that of its sequence."""
    if scope == "token":
        return values
    assert sequences is not None
    match scope:
        case "sequence" | "seq_sum":
            return sequences.sum(values)
        case "geometric" | "seq_mean":
            return sequences.mean(values)
        case "seq_max":
            return sequences.max(values)
        case _:
            raise ValueError(f"the scope of a rollout correction must be one of {ROLLOUT_LEVELS}, got {scope!r}")


def _between(values: Tensor, band: Band) -> Tensor:
    low, high = band
    inside = torch.ones_like(values, dtype=torch.bool)
    if low is not None:
        inside &= values >= low
    if high is not None:
        inside &= values <= high
    return inside


def _require_order(names: str, band: Band) -> None:
    low, high = band
    if low is not None and high is not None and low > high:
        raise ValueError(f"{names} must be the least and the largest value, got {low!r} and {high!r}")


def _triples(masks: object) -> tuple[tuple[str, float | None, float | None], ...]:
    """Masks as ``(name, least, largest)``, sorted: so that corrections with the same are equal, and can be hashed."""
    if isinstance(masks, tuple) and all(isinstance(x, tuple) and len(x) == 3 for x in masks):
        masks = {name: (low, high) for name, low, high in masks}
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks must be a mapping from names to bounds, got {masks!r}")
    triples = []
    for name, bounds in masks.items():
        require_choice("masks", name, MASKS)
        low, high = bounds if isinstance(bounds, tuple | list) and len(bounds) == 2 else (None, bounds)
        for bound in (low, high):
            if bound is not None:
                require_number(f"masks[{name!r}]", bound, "in nats, or None", lambda value: True)
        if low is None and high is None:
            raise ValueError(f"masks[{name!r}] must have a bound, got {bounds!r}")
        _require_order(f"masks[{name!r}]", (low, high))
        triples.append((name, low, high))
    return tuple(sorted(triples, key=lambda triple: triple[0]))
