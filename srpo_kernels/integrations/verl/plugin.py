"""A plugin of verl: its policy-loss and distillation-loss hooks, computed by srpo_kernels.

verl imports this through the entry-point group ``verl.plugins``. It registers every policy loss that ``srpo_kernels``
has by then, as ``srpo_grpo`` and so on, and the distillation loss ``srpo_sampled``.

A policy-loss hook is handed log-probs, a distillation-loss hook those of the student and of a teacher at the sampled
token: neither has hidden states, the LM head, or the teacher's distribution. So full-vocabulary divergences, the
entropy-aware weights, the routing between the branches and the fused computation cannot be expressed there, and the
names ``srpo`` and ``sdpo`` are registered to say so.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from verl.trainer.distillation.losses import DistillationLossSettings, register_distillation_loss
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
from verl.workers.utils.padding import no_padding_2_padding

import srpo_kernels as sk
from srpo_kernels.integrations.verl.losses import policy_options

POLICY_LOSSES = {f"srpo_{name}": name for name in sk.POLICY_LOSSES}
DISTILLATION_LOSS = "srpo_sampled"
REFUSED = ("srpo", "sdpo")

# Of verl's losses that have a ratio per token.
_LOG_RATIO_CLAMP = 20.0


def loss_config(loss_type: str, config: Any) -> sk.SRPOConfig:
    """The options of verl's ``ActorConfig`` as those of a policy loss: see ``policy_options``."""
    return sk.SRPOConfig(**policy_options(loss_type, config))


def _policy_loss(loss_type: str) -> Any:
    """A function of verl's ``PolicyLossFn`` signature."""

    def compute(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        if config is None:
            raise ValueError("config must be verl's ActorConfig, got None")
        mask = response_mask.bool()
        options = loss_config(loss_type, config)
        terms = sk.policy_loss(
            log_prob,
            advantages,
            mask=mask,
            old_log_probs=old_log_prob,
            is_weights=rollout_is_weights,
            config=options,
        )
        loss: Tensor = agg_loss(
            loss_mat=terms.loss, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info
        )
        log_ratio = (log_prob.detach() - old_log_prob).masked_fill(~mask, 0.0)
        if not sk.POLICY_LOSSES[loss_type].whole_sequences:
            # verl's metrics are of the ratio that its loss has.
            log_ratio = log_ratio.clamp(-_LOG_RATIO_CLAMP, _LOG_RATIO_CLAMP)
        clip = terms.clip_low | terms.clip_high
        if loss_type == "cispo":
            # There, without the advantage.
            ratio = log_ratio.exp()
            clip = ratio != ratio.clamp(1.0 - options.epsilon_low, 1.0 + options.epsilon_high)
        sums = [clip, terms.dual_clip, -log_ratio, mask]
        clipped, dual_clipped, kl, tokens = torch.stack([values.sum().float() for values in sums]).tolist()
        tokens = max(tokens, 1.0)
        return loss, {
            "actor/pg_clipfrac": clipped / tokens,
            "actor/ppo_kl": kl / tokens,
            "actor/pg_clipfrac_lower": dual_clipped / tokens,
        }

    return compute


def _sampled_distillation(
    config: Any, distillation_config: Any, model_output: dict[str, Any], data: Any
) -> tuple[Tensor, dict[str, float]]:
    """A function of verl's ``DistillationLossFn`` signature: ``sg(log p - log q) log p`` at the sampled token.

    Its gradient is that of the reverse KL, its value is not: verl must neither clamp it nor use it as a reward.
    """
    options = distillation_config.distillation_loss
    if options.use_policy_gradient:
        raise ValueError(f"use_policy_gradient must be False with loss_mode={DISTILLATION_LOSS!r}, got True")
    if options.loss_max_clamp is not None:
        raise ValueError(
            f"loss_max_clamp must be None with loss_mode={DISTILLATION_LOSS!r}, got {options.loss_max_clamp!r}: "
            "it would cut off the gradient of the tokens that are furthest from the teacher"
        )
    mask, old_log_probs = _padded(data["response_mask"], False).bool(), _padded(data["old_log_probs"], 0.0)
    log_probs = no_padding_2_padding(model_output["log_probs"], data)
    teacher_log_probs = no_padding_2_padding(data["teacher_logprobs"], data).squeeze(-1)
    losses = sk.sampled_distillation_loss(log_probs, teacher_log_probs, mask=mask, old_log_probs=old_log_probs)
    gap = (log_probs.detach() - teacher_log_probs)[mask]
    return losses, {"distillation/reverse_kl": gap.mean().item() if len(gap) else 0.0}


def _padded(values: Tensor, padding: float) -> Tensor:
    padded: Tensor = values.to_padded_tensor(padding) if values.is_nested else values
    return padded


def _refusal(name: str) -> Any:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(
            f"{name!r} needs the hidden states of student and teacher, which verl's loss hooks do not hand over; "
            f"registered are {', '.join(POLICY_LOSSES)} as policy_loss.loss_mode and {DISTILLATION_LOSS} as "
            "distillation_loss.loss_mode"
        )

    return refuse


for _name, _loss_type in POLICY_LOSSES.items():
    register_policy_loss(_name)(_policy_loss(_loss_type))
for _name in REFUSED:
    register_policy_loss(_name)(_refusal(_name))
register_distillation_loss(DistillationLossSettings(names=[DISTILLATION_LOSS], use_estimator=True))(
    _sampled_distillation
)
