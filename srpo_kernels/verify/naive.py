"""SRPO in plain torch with full logits, gradients by autograd: what the library is held to, and timed against.

In fp64 it is taken for the truth. It favours brevity over speed and memory, and trusts its inputs. The formulas are
those of arXiv 2604.02288, sections 3.1 to 3.3; ``z``, ``y`` are student and teacher logits, ``p``, ``q`` their softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from srpo_kernels import Normalizers, SRPOConfig, SRPOOutput, TeacherStats, TokenStats
from srpo_kernels.checks import refuse_name

# Minus infinity: 0 times it is 0.
_LOWEST = -1e30
# What an exponential of a log-ratio is bounded by, in fp32 as in fp64.
_LARGEST_LOG_RATIO = 80.0

Project = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``[n, H]``, ``[V, H]`` and ``[V]`` to logits ``[n, V]`` in fp32 or fp64."""


def project_wide(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits in fp32 whatever the model's dtype (fp64 for fp64).

    On an accelerator their gradient is rounded to bf16 for a bf16 model, as the operand of torch's own products is.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    if hidden.dtype == torch.bfloat16 and not hidden.is_cpu and logits.requires_grad:
        logits.register_hook(lambda gradient: gradient.bfloat16().to(dtype))
    return logits


def project_narrow(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What trainers do: logits in the model's dtype, widened afterwards."""
    return linear(hidden, weight, bias).to(torch.promote_types(hidden.dtype, torch.float32))


def srpo_loss(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    advantages: Tensor,
    config: SRPOConfig,
    mask: Tensor | None = None,
    sdpo_mask: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    is_weights: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    normalizers: Normalizers | None = None,
    project: Project = project_wide,
) -> SRPOOutput:
    """The arguments of ``srpo_kernels.srpo_loss``; no metrics, and log-probs of the rows that can move a weight."""
    valid = torch.ones_like(target_ids, dtype=torch.bool) if mask is None else mask
    routed = torch.zeros_like(valid) if sdpo_mask is None else _spread(sdpo_mask, valid)
    if sequence_ids is None:
        # Nothing reads those of packed rows: where a sequence matters, they come with theirs.
        sequence_ids = _spread(torch.arange(len(valid), device=valid.device), valid)
    advantages, policy, distilled = _spread(advantages, valid), valid & ~routed, valid & routed

    def pick(values: Tensor | None, rows: Tensor) -> Tensor | None:
        return None if values is None else values[rows]

    log_p = log_softmax(project(hidden[valid], weight, bias), config)
    chosen = log_p.gather(1, target_ids[valid][:, None]).squeeze(1)
    log_probs = torch.zeros(valid.shape, dtype=chosen.dtype, device=chosen.device).masked_scatter(valid, chosen)
    policy_losses = _policy_losses(
        log_probs[policy],
        entropy(log_p[policy[valid]]) if config.entropy_coef else None,
        advantages[policy],
        pick(old_log_probs, policy),
        pick(ref_log_probs, policy),
        pick(is_weights, policy),
        sequence_ids[policy],
        config,
    )
    losses = torch.zeros_like(log_probs).masked_scatter(policy, policy_losses)
    if distilled.any():
        assert teacher_hidden is not None
        assert sdpo_mask is not None
        # The teacher's states of every row, or of the routed sequences alone.
        taught = distilled if teacher_hidden.shape[:-1] == valid.shape else distilled[sdpo_mask]
        head = (weight, bias) if teacher_weight is None else (teacher_weight, teacher_bias)
        with torch.no_grad():
            log_q = log_softmax(project(teacher_hidden[taught], *head), config)
        distillation_losses = _distillation_losses(
            log_p[distilled[valid]],
            log_q,
            target_ids[distilled],
            pick(old_log_probs, distilled),
            pick(is_weights, distilled),
            None if normalizers is None else normalizers.dw_log_mean,
            config,
        )
        losses = losses.masked_scatter(distilled, distillation_losses)
    loss = (losses * _shares(valid, sequence_ids, normalizers, config, losses.dtype)).sum()
    moving = distilled | _moving(policy, advantages, sequence_ids, config)
    return SRPOOutput(loss, {}, log_probs.detach() * moving)


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    config: SRPOConfig,
    mask: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
) -> TokenStats:
    """The tensors of ``srpo_kernels.token_stats``; its options are those of ``config``."""
    valid = torch.ones_like(target_ids, dtype=torch.bool) if mask is None else mask

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(valid.shape).masked_scatter(valid, values)

    log_p = log_softmax(project_wide(hidden[valid], weight, bias), config)
    log_probs = log_p.gather(1, target_ids[valid][:, None]).squeeze(1)
    if teacher_hidden is None:
        return TokenStats(spread(log_probs), spread(entropy(log_p)), None, None)
    head = (weight, bias) if teacher_weight is None else (teacher_weight, teacher_bias)
    with torch.no_grad():
        log_q = log_softmax(project_wide(teacher_hidden[valid], *head), config)
    value = _divergence(log_p, log_q, config)
    return TokenStats(*map(spread, (log_probs, entropy(log_p), value, entropy(log_q))))


def teacher_stats(
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    config: SRPOConfig,
    mask: Tensor | None = None,
    teacher_bias: Tensor | None = None,
) -> TeacherStats:
    """The tensors of ``srpo_kernels.teacher_stats``; its options are those of ``config``."""
    valid = torch.ones(teacher_hidden.shape[:-1], dtype=torch.bool, device=teacher_hidden.device)
    valid = valid if mask is None else mask
    logits = _transformed(project_wide(teacher_hidden[valid], teacher_weight, teacher_bias), config)
    values = (entropy(logits.log_softmax(1)), logits.logsumexp(1))
    return TeacherStats(*(x.new_zeros(valid.shape).masked_scatter(valid, x) for x in values))


def log_softmax(raw: Tensor, config: SRPOConfig) -> Tensor:
    """Log-probabilities ``[n, V]`` of raw logits."""
    return _transformed(raw, config).log_softmax(1)


def entropy(log_p: Tensor) -> Tensor:
    """``[n, V]`` to ``[n]``."""
    return -(log_p.exp() * log_p).sum(1)


def _transformed(raw: Tensor, config: SRPOConfig) -> Tensor:
    x = raw.clamp(min=_LOWEST) * config.logit_scale
    if config.softcap is not None:
        x = config.softcap * torch.tanh(x / config.softcap)
    return x / config.temperature


def _spread(values: Tensor, rows: Tensor) -> Tensor:
    """Values per sequence repeated over its rows; values per row as they are."""
    return values if values.shape == rows.shape else values[:, None].expand_as(rows)


def _policy_losses(
    log_probs: Tensor,
    entropies: Tensor | None,
    advantages: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    is_weights: Tensor | None,
    sequences: Tensor,
    config: SRPOConfig,
) -> Tensor:
    bound = min(config.log_ratio_clamp or _LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    log_ratio = (log_probs - (log_probs.detach() if old is None else old)).clamp(-bound, bound)
    if config.loss_type == "gspo":
        log_ratio = _sequence_sum(log_ratio, sequences) / _sequence_sum(torch.ones_like(log_ratio), sequences)
    losses = _ratio_losses(log_ratio.exp(), log_probs, advantages, config)
    if is_weights is not None:
        losses = losses * is_weights
    if config.kl_coef:
        assert ref is not None
        losses = losses + config.kl_coef * _kl_estimate(log_probs - ref, bound, config)
    return losses if entropies is None else losses - config.entropy_coef * entropies


def _kl_estimate(d: Tensor, bound: float, config: SRPOConfig) -> Tensor:
    if config.kl_type == "k1":
        return d
    if config.kl_type == "k2":
        return d.square() / 2
    if config.kl_type != "k3":
        refuse_name("kl_type", config.kl_type)
    d = d.clamp(-bound, bound)
    return torch.expm1(-d) + d


def _ratio_losses(ratio: Tensor, log_probs: Tensor, advantages: Tensor, config: SRPOConfig) -> Tensor:
    clipped = ratio.clamp(1 - config.epsilon_low, 1 + config.epsilon_high)
    if config.loss_type == "cispo":
        return -clipped.detach() * advantages * log_probs
    if config.loss_type == "reinforce":
        return -advantages * log_probs
    if config.loss_type == "sapo":
        tau = torch.full_like(ratio, 1.05).masked_fill(advantages > 0, 1.0)
        return -advantages * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    if config.loss_type != "grpo" and config.loss_type != "gspo":
        raise ValueError(f"loss_type={config.loss_type!r} is not implemented")
    bounded = ratio if config.delta is None else ratio.clamp(max=config.delta)
    losses = -torch.minimum(bounded * advantages, clipped * advantages)
    if config.dual_clip is None:
        return losses
    return torch.where(advantages < 0, torch.minimum(losses, -config.dual_clip * advantages), losses)


def _distillation_losses(
    log_p: Tensor,
    log_q: Tensor,
    target_ids: Tensor,
    old: Tensor | None,
    is_weights: Tensor | None,
    log_mean: Tensor | None,
    config: SRPOConfig,
) -> Tensor:
    log_weights = -config.dw_beta * entropy(log_q)
    log_mean = log_weights.logsumexp(0) - math.log(len(log_weights)) if log_mean is None else log_mean
    weights = torch.exp(log_weights - log_mean)
    log_probs, teacher_log_probs = (x.gather(1, target_ids[:, None]).squeeze(1) for x in (log_p, log_q))
    if old is not None and config.distillation_is_clip is not None:
        weights = weights * (log_probs.detach() - old).clamp(-20, 20).exp().clamp(max=config.distillation_is_clip)
    if is_weights is not None:
        weights = weights * is_weights
    if config.distillation_mode == "sampled":
        return weights * (log_probs - teacher_log_probs).detach() * log_probs
    if config.distillation_mode == "topk":
        ids = log_p.topk(min(config.topk, log_p.shape[1]), dim=1).indices
        log_p, log_q = (_buckets(x, ids, config.add_tail) for x in (log_p, log_q))
    elif config.distillation_mode != "full":
        refuse_name("distillation_mode", config.distillation_mode)
    return weights * _divergence(log_p, log_q, config)


def _buckets(log_p: Tensor, ids: Tensor, add_tail: bool) -> Tensor:
    """The log-probs at ``ids`` and that of all other tokens together, or the former renormalised."""
    inside = log_p.gather(1, ids)
    if not add_tail:
        return inside.log_softmax(1)
    tail = log_p.scatter(1, ids, -math.inf).logsumexp(1, keepdim=True)
    return torch.cat([inside, tail], dim=1) if ids.shape[1] < log_p.shape[1] else inside


def _divergence(log_p: Tensor, log_q: Tensor, config: SRPOConfig) -> Tensor:
    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).sum(1)

    if config.divergence == "forward_kl":
        return kl(log_q, log_p)
    if config.divergence == "reverse_kl":
        return kl(log_p, log_q)
    if config.divergence != "jsd":
        refuse_name("divergence", config.divergence)
    log_m = torch.logaddexp(log_p + math.log1p(-config.alpha), log_q + math.log(config.alpha))
    return (1 - config.alpha) * kl(log_p, log_m) + config.alpha * kl(log_q, log_m)


def _sequence_sum(values: Tensor, sequences: Tensor) -> Tensor:
    """Each row gets the sum over the rows of its sequence."""
    known, index = torch.unique(sequences, return_inverse=True)
    return values.new_zeros(len(known)).index_add(0, index.flatten(), values.flatten())[index]


def _moving(policy: Tensor, advantages: Tensor, sequences: Tensor, config: SRPOConfig) -> Tensor:
    """The policy rows that can move a weight."""
    if config.kl_coef or config.entropy_coef:
        return policy
    moving = policy & (advantages != 0)
    return policy & (_sequence_sum(moving.long(), sequences) > 0) if config.loss_type == "gspo" else moving


def _shares(
    valid: Tensor, sequences: Tensor, normalizers: Normalizers | None, config: SRPOConfig, dtype: torch.dtype
) -> Tensor:
    """Each row's share of the loss: one over the reduction's denominator."""
    ones = valid.to(dtype)
    if config.reduction == "token":
        return ones / (valid.sum() if normalizers is None else normalizers.token_count)
    lengths = _sequence_sum(ones, sequences).clamp(min=1)
    if config.reduction == "constant":
        lengths = torch.full_like(lengths, config.max_length or 0)
    elif config.reduction != "sequence":
        refuse_name("reduction", config.reduction)
    return ones / (lengths * len(torch.unique(sequences[valid])))
