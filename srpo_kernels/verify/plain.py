"""The loss in plain torch as a trainer writes it, of the oracle's formulas: what the library is timed against."""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_kernels import SRPOConfig
from srpo_kernels_reference.distillation import divergence, entropy_weights, weight_log_mean
from srpo_kernels_reference.layout import per_row
from srpo_kernels_reference.logits import head_logits, log_prob_entropy, working_dtype
from srpo_kernels_reference.policy import policy_loss


def srpo_loss(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    advantages: Tensor,
    mask: Tensor,
    sdpo_mask: Tensor,
    teacher_hidden: Tensor,
    config: SRPOConfig,
) -> Tensor:
    """The loss without old log-probs: full logits of every valid row, in the model's dtype, and one log-softmax."""

    def log_softmax(states: Tensor) -> Tensor:
        logits = head_logits(
            states,
            weight,
            temperature=config.temperature,
            logit_scale=config.logit_scale,
            softcap=config.softcap,
            project=project_narrow,
        )
        return logits.log_softmax(-1)

    routed = per_row(sdpo_mask, target_ids)[mask]
    log_p = log_softmax(hidden[mask])
    log_probs = log_p.gather(1, target_ids[mask][:, None]).squeeze(1)[~routed]
    sequences = per_row(torch.arange(len(target_ids), device=target_ids.device), target_ids)
    values = (per_row(x, target_ids)[mask][~routed] for x in (advantages, sequences))
    total = policy_loss(log_probs, None, next(values), config, next(values)).sum()
    if routed.any():
        with torch.no_grad():
            log_q = log_softmax(teacher_hidden[mask][routed])
            entropies = log_prob_entropy(log_q)
            weights = entropy_weights(entropies, config.dw_beta, weight_log_mean(entropies, config.dw_beta))
        total = total + (weights * divergence(log_p[routed], log_q, config.divergence, config.alpha)).sum()
    return total / mask.sum()


def project_narrow(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What trainers do: logits in the model's dtype, widened afterwards."""
    return torch.nn.functional.linear(hidden, weight, bias).to(working_dtype(hidden))
