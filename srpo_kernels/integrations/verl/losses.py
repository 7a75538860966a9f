"""verl's options of a loss as those of `SRPOConfig`."""

from __future__ import annotations

from typing import Any

import srpo_kernels as sk

# verl's names of policy losses that have another one here; `srpo_` and a name of `POLICY_LOSSES` is that one.
_NAMES = {"vanilla": "grpo", "gspo": "gspo_token", "geo_mean": "gmpo", "gpg": "reinforce"}
# The options of a policy loss's own, by the names of verl's ``ActorConfig`` and its ``policy_loss``.
_OPTIONS = {
    "sapo": {"tau_positive": "tau_pos", "tau_negative": "tau_neg"},
    "dppo_tv": {"ratio_max": "clip_ratio_c"},
    "dppo_kl": {"ratio_max": "clip_ratio_c"},
    "dro": {"beta": "dro_beta"},
    "clip_cov": {"share": "clip_cov_ratio", "cov_low": "clip_cov_lb", "cov_high": "clip_cov_ub"},
    "kl_cov": {"share": "kl_cov_ratio", "coefficient": "ppo_kl_coef"},
}
# The fields of `SRPOConfig` that an option of verl's, or of the `srpo` section, becomes.
_FIELDS = {
    "epsilon_low": "actor.clip_ratio_low",
    "epsilon_high": "actor.clip_ratio_high",
    "dual_clip": "actor.clip_ratio_c",
    "kl_coef": "actor.kl_loss_coef",
    "entropy_coef": "actor.entropy_coeff",
    "max_length": "actor.loss_scale_factor",
    "alpha": "srpo.distillation_alpha",
    "distillation_mode": "srpo.distillation_mode",
    "topk": "srpo.distillation_topk",
    "add_tail": "srpo.distillation_add_tail",
    "distillation_is_clip": "srpo.distillation_is_clip",
    "dw_beta": "srpo.dw_beta",
}
# Of verl's losses those that it averages by sequence, whatever `loss_agg_mode` says.
_BY_SEQUENCE = ("sapo", "geo_mean")
_REDUCTIONS = {
    "token-mean": "token",
    "token-sum": "token_sum",
    "seq-mean-token-mean": "sequence",
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-sum-norm": "constant",
}
_KL_TYPES = {
    "kl": "k1",
    "k1": "k1",
    "mse": "k2",
    "k2": "k2",
    "low_var_kl": "k3_bounded",
    "k3": "k3_bounded",
    "kl+": "k1+",
    "k1+": "k1+",
    "mse+": "k2",
    "k2+": "k2",
    "low_var_kl+": "k3+",
    "k3+": "k3+",
}


def policy_options(loss_type: str, config: Any) -> dict[str, Any]:
    """What verl's ``ActorConfig`` says of a policy loss, as fields of `SRPOConfig`.

    ``clip_ratio_low``, ``clip_ratio_high`` (``clip_ratio`` where None); for losses that read it and have a ratio per
    token, ``clip_ratio_c`` as the dual clip; ``tau_pos`` and ``tau_neg`` for ``sapo``, and the options of
    ``policy_loss`` for the losses that verl has too.
    """
    loss = sk.POLICY_LOSSES[loss_type]
    has_dual_clip = "dual_clip" in loss.fields and not loss.whole_sequences and not loss.whole_batch
    low, high = config.clip_ratio_low, config.clip_ratio_high
    values = {ours: _value(config, theirs) for ours, theirs in _OPTIONS.get(loss_type, {}).items()}
    return {
        "loss_type": loss_type,
        "epsilon_low": config.clip_ratio if low is None else low,
        "epsilon_high": config.clip_ratio if high is None else high,
        "dual_clip": config.get("clip_ratio_c", 3.0) if has_dual_clip else None,
        "loss_options": {name: value for name, value in values.items() if value is not None},
    }


def actor_options(config: Any) -> dict[str, Any]:
    """Everything that verl's ``actor`` section says of the policy loss, its reduction, KL and entropy.

    Raises ValueError for a value that the fused loss does not have, by the option's name.
    """
    name = config.policy_loss.loss_mode
    loss_type = resolve_loss_mode(name)
    options = policy_options(loss_type, config)
    mode, length = config.loss_agg_mode, config.loss_scale_factor
    if mode not in _REDUCTIONS:
        raise ValueError(f"actor.loss_agg_mode must be one of {tuple(_REDUCTIONS)}, got {mode!r}")
    if name in _BY_SEQUENCE and mode != "seq-mean-token-mean":
        raise ValueError(
            f"actor.loss_agg_mode must be 'seq-mean-token-mean' with policy_loss.loss_mode={name!r}, which verl "
            f"averages so whatever it says, got {mode!r}; policy_loss.loss_mode=srpo_{loss_type} takes any"
        )
    if name == "dro" and config.policy_loss.dro_beta is None:
        raise ValueError("actor.policy_loss.dro_beta must be given with policy_loss.loss_mode='dro', got None")
    options["reduction"] = _REDUCTIONS[mode]
    if mode == "seq-mean-token-sum-norm":
        if length is None:
            raise ValueError(
                f"actor.loss_scale_factor must be given with loss_agg_mode={mode!r}, the length to divide by, got None:"
                " verl's default is that of a micro-batch's longest response, which depends on how the batch is split"
            )
        options["max_length"] = int(length)
    elif length is not None:
        raise ValueError(f"actor.loss_scale_factor must be null with loss_agg_mode={mode!r}, got {length!r}")
    options["entropy_coef"] = float(config.entropy_coeff)
    if config.use_kl_loss:
        if config.kl_loss_type not in _KL_TYPES:
            raise ValueError(f"actor.kl_loss_type must be one of {tuple(_KL_TYPES)}, got {config.kl_loss_type!r}")
        options |= {"kl_coef": float(config.kl_loss_coef), "kl_type": _KL_TYPES[config.kl_loss_type]}
    return options


def resolve_loss_mode(loss_mode: str) -> str:
    """The policy loss of a ``policy_loss.loss_mode``: verl's name, or ``srpo_`` and one of ``POLICY_LOSSES``.

    A name of ``POLICY_LOSSES`` that verl has no other loss for is taken as it is. Raises ValueError for other names.
    """
    name = _NAMES.get(loss_mode, loss_mode)
    if name not in sk.POLICY_LOSSES:
        name = loss_mode.removeprefix("srpo_")
    if name not in sk.POLICY_LOSSES:
        names = (*_NAMES, *sk.POLICY_LOSSES)
        raise ValueError(
            f"actor.policy_loss.loss_mode must be one of {tuple(dict.fromkeys(names))}, or srpo_ and one of "
            f"POLICY_LOSSES, got {loss_mode!r}"
        )
    return name


def in_verls_words(error: Exception, loss_type: str) -> str:
    """What `SRPOConfig` says of a field, by the option that it comes from."""
    name, _, rest = str(error).partition(" ")
    own = {f"loss_options[{ours!r}]": f"actor.{theirs}" for ours, theirs in _OPTIONS.get(loss_type, {}).items()}
    return f"{(_FIELDS | own).get(name, name)} {rest}"


def _value(config: Any, name: str) -> float | None:
    """An option of ``ActorConfig``, or of its ``policy_loss``; None where verl has none."""
    policy_loss = getattr(config, "policy_loss", None)
    value: float | None = getattr(config, name, getattr(policy_loss, name, None))
    return value
