"""TRL's loss types as configs of `srpo_loss`, and what is left to TRL's own code on the log-probs of this library."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import srpo_kernels as sk

TokenDenominator = Literal["step", "generation_batch"]


class LossType(NamedTuple):
    """A policy loss by token and by sequence (None: not of this library's), and its reduction."""

    by_token: str
    by_sequence: str | None
    reduction: str


# With ``reduction="token"`` "bnpo" counts the tokens of a micro-batch, the others those of a step.
_LOSSES = {
    "dapo": LossType("grpo", "gspo", "token"),
    "bnpo": LossType("grpo", "gspo", "token"),
    "grpo": LossType("grpo", "gspo", "sequence"),
    "dr_grpo": LossType("grpo", "gspo", "constant"),
    "luspo": LossType("grpo", "gspo", "sequence_sum"),
    "cispo": LossType("cispo", None, "token"),
    "sapo": LossType("sapo", None, "sequence"),
    "vespo": LossType("vespo", "vespo", "token"),
}
# The options of a policy loss's own, by TRL's names.
_LOSS_OPTIONS = {
    "sapo": {"tau_positive": "sapo_temperature_pos", "tau_negative": "sapo_temperature_neg"},
    "vespo": {
        "k_positive": "vespo_k_pos",
        "lambda_positive": "vespo_lambda_pos",
        "k_negative": "vespo_k_neg",
        "lambda_negative": "vespo_lambda_neg",
    },
}


def resolve_loss_type(name: str) -> LossType:
    """What a loss type of TRL's is, or that of a registered loss, which is per token.

    Raises ValueError for other names.
    """
    if name in _LOSSES:
        return _LOSSES[name]
    if name in sk.POLICY_LOSSES:
        return LossType(name, None, "token")
    names = tuple(dict.fromkeys((*_LOSSES, *sk.POLICY_LOSSES)))
    raise ValueError(f"loss_type must be one of {names}, got {name!r}")


def is_trls(name: str) -> bool:
    """Whether TRL has a loss type of this name."""
    return name in _LOSSES


def loss_config(args: Any, transform: sk.LogitTransform, *, has_policy: bool) -> sk.SRPOConfig:
    """The options of `srpo_loss` for an `SRPOTrainerConfig`, with the logit scale and softcap of a model.

    ``has_policy`` False: the policy branch is TRL's, and these are the options of the divergence, and those that both
    branches share. Raises ValueError for a value that the loss does not take.
    """
    kind = resolve_loss_type(args.loss_type)
    by_sequence = args.importance_sampling_level == "sequence"
    loss_type = kind.by_sequence if by_sequence and kind.by_sequence is not None else kind.by_token
    epsilon_low, epsilon_high = args.epsilon, args.epsilon if args.epsilon_high is None else args.epsilon_high
    if loss_type == "cispo":
        # TRL's bound of the ratio is epsilon_high itself, and there is no lower one.
        epsilon_low, epsilon_high = 1.0, max(epsilon_high - 1.0, 0.0)
    own = _LOSS_OPTIONS.get(loss_type, {})
    options: dict[str, Any] = {
        "loss_type": loss_type,
        "loss_options": {ours: getattr(args, theirs) for ours, theirs in own.items()},
        "epsilon_low": epsilon_low,
        "epsilon_high": epsilon_high,
        "dual_clip": args.dual_clip,
        "kl_coef": args.beta,
        "entropy_coef": args.entropy_coef,
        "count_entropy": args.log_entropy,
        "count_inactive": args.log_entropy,
        "distillation_mode": args.distillation_mode,
        "topk": args.distillation_topk,
        "add_tail": args.distillation_add_tail,
        "distillation_is_clip": args.distillation_is_clip,
        "dw_beta": args.dw_beta,
        "temperature": args.temperature,
        "logit_scale": transform.logit_scale,
        "softcap": transform.softcap,
        "reduction": kind.reduction,
        "max_length": args.max_completion_length if kind.reduction == "constant" else None,
    }
    if not is_trls(args.loss_type) or kind.by_token == "grpo":
        # TRL's other losses do not read it.
        options["delta"] = args.delta
    if args.beta != 0.0 and args.use_bias_correction_kl:
        options["kl_type"] = "k3_weighted"
    if not has_policy:
        options |= {"kl_coef": 0.0, "entropy_coef": 0.0, "count_entropy": False}
    return sk.SRPOConfig.from_alpha(args.distillation_alpha, **options)


def reasons_for_log_probs(args: Any) -> list[str]:
    """The options, as text, whose policy loss is TRL's own on log-probs of this library; empty where it is `srpo_loss`.

    That costs a fourth matmul with the head, and a forward of completions that cannot move a weight.
    """
    by_sequence, kind = args.importance_sampling_level == "sequence", resolve_loss_type(args.loss_type)
    bound = args.epsilon if args.epsilon_high is None else args.epsilon_high
    conditions = {
        "top_entropy_quantile": args.top_entropy_quantile < 1.0,
        "off_policy_mask_threshold": args.off_policy_mask_threshold is not None,
        "use_adaptive_entropy": args.use_adaptive_entropy,
        "entropy_coef with a loss that is not per token": args.entropy_coef != 0.0 and kind.reduction != "token",
        "entropy_coef with token_denominator='generation_batch'": (
            args.entropy_coef != 0.0 and args.token_denominator == "generation_batch"
        ),
        "use_bias_correction_kl with ratios of sequences": (
            by_sequence and args.beta != 0.0 and args.use_bias_correction_kl
        ),
        "loss_type with ratios of sequences": by_sequence and kind.by_sequence is None,
        "cispo's bound below 1": args.loss_type == "cispo" and bound < 1.0,
        "vespo with vLLM's correction": (
            args.loss_type == "vespo" and args.use_vllm and args.vllm_importance_sampling_correction
        ),
    }
    return [reason for reason, holds in conditions.items() if holds]
