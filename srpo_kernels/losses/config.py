"""SRPOConfig: every option of the loss, checked when it is constructed."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from srpo_kernels.checks import require_count, require_number
from srpo_kernels.losses.log_ratio import KLType
from srpo_kernels.losses.options import (
    ANY,
    CHOICES,
    OPTIONAL_RANGES,
    RANGES,
    DistillationMode,
    Reduction,
    require_mixture,
    require_option,
    require_transform,
)
from srpo_kernels.losses.registry import POLICY_LOSSES, policy_loss_of
from srpo_kernels.losses.rollout import RolloutCorrection
from srpo_kernels.rows.mixture import Divergence
from srpo_kernels.rows.spec import LogitTransform, TopkOf


@dataclass(frozen=True, kw_only=True)
class SRPOConfig:
    """The options of the SRPO loss. The defaults are the paper's, with the full vocabulary for its top 100.

    ``rho = exp(log_probs - old_log_probs)`` is the ratio, ``A`` the advantage, ``p`` the student and ``q``
    the teacher; the logits of both become ``softcap * tanh(x * logit_scale / softcap) / temperature``.
    Source: SRPO (arXiv 2604.02288), sections 3.1 to 3.3 and appendix B.

    Args:
        loss_type: the policy branch: ``"grpo"`` (clipped rho), or another name of ``POLICY_LOSSES``;
            docs/losses.md has the formula, the options and the source of each.
        loss_options: the loss's own options by name; ``"sapo"`` has ``tau_positive`` (1.0) and ``tau_negative``
            (1.05). Kept as sorted pairs.
        epsilon_low: rho is clipped to at least ``1 - epsilon_low``; >= 0. ``"gmpo"`` and the ``"dppo"`` losses bound
            another number by it.
        epsilon_high: rho is clipped to at most ``1 + epsilon_high``; >= 0; likewise.
        delta: upper bound of the unclipped rho; > 0, for ``"grpo"``, ``"gspo"``, ``"gspo_token"`` and ``"luspo"`` only.
            None: no bound.
        dual_clip: the loss is at most ``-dual_clip * A`` where ``A < 0``; > 1, for the same losses. None: no bound.
        log_ratio_clamp: bound of ``|log rho|`` (nats), and of ``|d|`` in k3, beyond which the gradient is 0; > 0. None:
            80, like any larger number: fp32 has no exponentials of more.
        kl_coef: weight of the divergence from ``ref_log_probs``; >= 0.
        kl_type: its estimator, with ``d = log_probs - ref_log_probs``: ``"k1"`` is ``d``, ``"k2"`` is
            ``d**2 / 2``, ``"k3"`` is ``exp(-d) + d - 1`` with ``|d|`` at most ``log_ratio_clamp``. All estimate
            KL(policy || reference) as a number. As a loss on the policy's own samples, k1 has a gradient of 0 in
            expectation, k2 that of KL(policy || reference), and k3 that of KL(reference || policy). ``"k1+"`` and
            ``"k3+"`` have the value of k1 and k3 and the gradient of k2; ``"k3_bounded"`` is at most 10;
            ``"k3_weighted"`` is ``rho * k3``, unbiased in value and gradient for samples of the old policy.
        entropy_coef: weight of the bonus ``H(p)``, which the loss subtracts; of either sign.
        divergence: the distillation branch: ``"forward_kl"`` is ``KL(q || p)``, ``"reverse_kl"`` is
            ``KL(p || q)``, ``"jsd"`` is ``(1 - alpha) KL(p || m) + alpha KL(q || m)`` with the mixture
            ``m = (1 - alpha) p + alpha q``; ``"skew_forward_kl"`` is ``KL(q || (1 - alpha) p + alpha q)`` and
            ``"skew_reverse_kl"`` is ``KL(p || (1 - alpha) q + alpha p)``, those of DistiLLM (arXiv 2402.03898,
            section 3.1; 0.1 there).
        alpha: the teacher's share in the mixture of ``"jsd"``; in those of the skewed divergences the share of the
            model whose own divergence from the mixture it is, so that one near 0 gives nearly ``"forward_kl"`` and
            ``"reverse_kl"``. Strictly between 0 and 1; the other two do not read it, but it must lie in [0, 1].
        divergence_clip: upper bound of each token's share of the divergence (nats): ``q log(q / p)`` of forward_kl, and
            so on, as in OPSD (arXiv 2601.18734); > 0. A token beyond it has no gradient of its own. None: no bound.
        distillation_mode: what is compared: ``"full"``, the whole vocabulary; ``"topk"``, the ``topk`` likeliest
            tokens of one model; ``"sampled"``, the sampled token.
        topk: the number of tokens that ``"topk"`` compares, at most all; >= 1.
        topk_of: whose they are: ``"student"`` or ``"teacher"``.
        add_tail: ``"topk"`` keeps the remaining probability in one more bucket. False: it renormalises.
        distillation_is_clip: upper bound of rho as a detached weight of the divergence; > 0. None: not
            weighted by rho.
        dw_beta: strength of the entropy-aware weight ``exp(-dw_beta * H(q))`` (per nat); >= 0.
        temperature: divides the logits; > 0.
        logit_scale: multiplies the logits, before the softcap; > 0.
        softcap: bounds the scaled logits; > 0. None: no bound.
        teacher_transform: the ``LogitTransform`` of a teacher that has another one: another model, or another
            temperature. It costs a pass over the teacher's logits in place, three where it has a softcap. None: the
            three above.
        reduction: ``"token"`` divides the sum by the valid tokens of both branches; ``"sequence"`` takes the
            mean of each sequence, then that of the sequences; ``"constant"`` divides by sequences times
            ``max_length``, ``"sequence_sum"`` by sequences, ``"token_sum"`` by nothing. A sequence without a valid
            token does not count, padded or packed; TRL counts it, which ``Normalizers.sequence_count`` can say.
        max_length: the length of ``"constant"`` (tokens); >= 1. None with the other reductions.
        count_inactive: also compute the log-probs of tokens that cannot move a weight, for the metrics.
        count_entropy: also compute the entropies of the policy tokens whose log-probs are computed, for the metrics.
        rollout_correction: weights and masks of rows that another policy than ``old_log_probs``' has sampled, whose
            ``rollout_log_probs`` a call then takes. None: none.

    Raises:
        TypeError: a value of the wrong type; a bool is no number.
        ValueError: a value out of its range or not finite, an unknown name, contradictory options.
    """

    loss_type: str = "grpo"
    loss_options: Mapping[str, float] | tuple[tuple[str, float], ...] = ()
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
    divergence_clip: float | None = None
    distillation_mode: DistillationMode = "full"
    topk: int = 100
    topk_of: TopkOf = "student"
    add_tail: bool = True
    distillation_is_clip: float | None = 2.0
    dw_beta: float = 1.0
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    teacher_transform: LogitTransform | None = None
    reduction: Reduction = "token"
    max_length: int | None = None
    count_inactive: bool = False
    count_entropy: bool = False
    rollout_correction: RolloutCorrection | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss_options", _pairs(self.loss_options))
        for name in ("loss_type", *CHOICES, *RANGES, *OPTIONAL_RANGES, "teacher_transform"):
            require_option(name, getattr(self, name))
        for name in ("add_tail", "count_inactive", "count_entropy"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        require_count("topk", self.topk)
        if self.max_length is not None:
            require_count("max_length", self.max_length)
        if not isinstance(self.rollout_correction, RolloutCorrection | None):
            raise TypeError(
                f"rollout_correction must be a RolloutCorrection or None, got {type(self.rollout_correction).__name__}"
            )
        self._check_policy_loss()
        self._refuse_contradictions()
        # Ready when it is constructed: a compiler guards on a string it finds, but cannot follow how it is made.
        options = {field.name: getattr(self, field.name) for field in fields(SRPOConfig)}
        if self.rollout_correction is not None:
            options["rollout_correction"] = self.rollout_correction.encode()
        object.__setattr__(self, "_encoded", json.dumps(options))

    def encode(self) -> str:
        """Every option as one string, the form in which an operator of a compiled graph takes them."""
        encoded: str = self._encoded  # type: ignore[attr-defined]
        return encoded

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def decode(encoded: str) -> SRPOConfig:
        """The config whose ``encode()`` this is."""
        options = json.loads(encoded)
        options["loss_options"] = dict(options["loss_options"])
        if options["rollout_correction"] is not None:
            options["rollout_correction"] = RolloutCorrection.decode(options["rollout_correction"])
        if options["teacher_transform"] is not None:
            options["teacher_transform"] = LogitTransform(*options["teacher_transform"])
        return SRPOConfig(**options)

    def _check_policy_loss(self) -> None:
        loss = policy_loss_of(self.loss_type)
        for name in ("delta", "dual_clip"):
            if getattr(self, name) is not None and name not in loss.fields:
                readers = " or ".join(repr(x.name) for x in POLICY_LOSSES.values() if name in x.fields)
                raise ValueError(
                    f"{name} must be None unless loss_type is {readers}, "
                    f"got {getattr(self, name)!r} with loss_type={self.loss_type!r}"
                )
        for name, value in dict(self.loss_options).items():
            if name not in loss.options:
                raise ValueError(
                    f"loss_options must be among {tuple(loss.options)} with loss_type={self.loss_type!r}, got {name!r}"
                )
            require_number(f"loss_options[{name!r}]", value, *loss.ranges.get(name, ANY))

    def policy_options(self) -> dict[str, Any]:
        """What the policy loss reads: fields of this config, and options of its own."""
        loss = policy_loss_of(self.loss_type)
        return {name: getattr(self, name) for name in loss.fields} | {**loss.options, **dict(self.loss_options)}

    @property
    def whole_sequences(self) -> bool:
        """Whether the policy branch sees all of its rows of a sequence together."""
        correction = self.rollout_correction
        off_policy = correction is not None and correction.off_policy_threshold is not None
        return policy_loss_of(self.loss_type).whole_sequences or off_policy

    @property
    def counts_sequences(self) -> bool:
        """Whether the reduction divides by a number of sequences."""
        return self.reduction not in ("token", "token_sum")

    @property
    def meets_sequences(self) -> bool:
        """Whether a row's loss, before the reduction, depends on the others of its sequence."""
        correction = self.rollout_correction
        return self.whole_sequences or (correction is not None and correction.by_sequence)

    @property
    def transform(self) -> LogitTransform:
        """The logit transform, of both models unless the teacher has its own."""
        return LogitTransform(self.temperature, self.logit_scale, self.softcap)

    @property
    def own_teacher_transform(self) -> LogitTransform | None:
        """The teacher's where it is another."""
        return None if self.teacher_transform == self.transform else self.teacher_transform

    def _refuse_contradictions(self) -> None:
        require_mixture(self.divergence, self.alpha)
        if self.divergence_clip is not None and self.distillation_mode == "sampled":
            raise ValueError(
                "divergence_clip must be None with distillation_mode='sampled', which has one token alone, "
                f"got {self.divergence_clip!r}"
            )
        require_transform(self.temperature, self.logit_scale, self.softcap, self.teacher_transform)
        if (self.max_length is not None) != (self.reduction == "constant"):
            raise ValueError(
                "max_length must be given with reduction='constant' and be None otherwise, "
                f"got {self.max_length!r} with reduction={self.reduction!r}"
            )

    @classmethod
    def from_alpha(cls, alpha: float, **options: Any) -> SRPOConfig:
        """The config whose divergence one number names, as in SDPO and TRL; ``options`` are the other fields.

        ``alpha`` in [0, 1]: 0 is ``"forward_kl"``, 1 is ``"reverse_kl"``, anything between is ``"jsd"``.
        Raises as the constructor does.
        """
        require_number("alpha", alpha, *RANGES["alpha"])
        divergence: Divergence = "forward_kl" if alpha == 0 else "reverse_kl" if alpha == 1 else "jsd"
        return cls(divergence=divergence, alpha=alpha, **options)


def _pairs(options: object) -> tuple[tuple[str, float], ...]:
    """Options by name as pairs, sorted: so that configs with the same are equal, and can be hashed."""
    if isinstance(options, tuple) and all(isinstance(x, tuple) and len(x) == 2 for x in options):
        options = dict(options)
    if not isinstance(options, Mapping):
        raise TypeError(f"loss_options must be a mapping from names to numbers, got {options!r}")
    for name in options:
        if not isinstance(name, str):
            raise TypeError(f"loss_options must have strings as names, got {name!r}")
    return tuple(sorted(options.items()))


class Unset(Enum):
    """The type of ``UNSET``, the default of a keyword in whose place a ``config`` can stand."""

    UNSET = "SRPOConfig's default"


UNSET = Unset.UNSET


def resolve_options(config: SRPOConfig | None, **keywords: Any) -> dict[str, Any]:
    """The options that ``keywords`` names, checked: ``config``'s, or for want of one those given and the defaults.

    Raises TypeError for a ``config`` of another type, ValueError for one beside a keyword.
    """
    given = {name: value for name, value in keywords.items() if value is not UNSET}
    if config is None:
        options = {name: given[name] if name in given else getattr(SRPOConfig, name) for name in keywords}
        for name, value in options.items():
            require_option(name, value)
        if "temperature" in options:
            own = options.get("teacher_transform")
            require_transform(options["temperature"], options["logit_scale"], options["softcap"], own)
        return options
    if not isinstance(config, SRPOConfig):
        raise TypeError(f"config must be an SRPOConfig or None, got {type(config).__name__}")
    if given:
        raise ValueError(f"config must stand alone, got it beside {given}: config has these options too")
    return {name: getattr(config, name) for name in keywords}
