"""What a step logs: TRL's metrics with TRL's values, and the means of srpo_kernels under names of their own.

TRL's are those of each micro-batch, over all processes; its log averages them. Source: TRL 1.16,
``GRPOTrainer._compute_loss``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import srpo_kernels as sk
from srpo_kernels.integrations.trl.config import SRPOTrainerConfig
from srpo_kernels.integrations.trl.losses import resolve_loss_type


def micro_batch_metrics(
    inputs: dict[str, Any],
    out: sk.SRPOOutput,
    mask: Tensor,
    args: SRPOTrainerConfig,
    accelerator: Any,
    entropy: tuple[Tensor, Tensor] | None,
) -> dict[str, float]:
    """What TRL logs of the loss of a micro-batch.

    ``inputs`` are the micro-batch, ``out.log_probs`` and ``mask``, the valid tokens, are ``[B, T]``. Clip ratios are
    over all valid tokens, or over all sequences where a sequence has one ratio; those that are distilled are not
    clipped. ``entropy`` is the sum and the number of those that are logged, None for none.
    """
    log_probs, sums = out.log_probs, out.metrics
    advantages = inputs["advantages"]
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    advantages = advantages.masked_fill(inputs["sdpo_mask"][:, None], 0.0)
    old = inputs.get("old_per_token_logps")
    by_sequence = args.importance_sampling_level == "sequence"
    moves = (advantages != 0.0).any(1, keepdim=True) if by_sequence else advantages != 0.0
    ratio = _ratio(log_probs, old, mask & moves, by_sequence=by_sequence)
    epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high

    # The total and the count of each mean, in this process.
    shares: dict[str, tuple[Tensor, Tensor]] = {}
    extremes: dict[str, float] = {}
    if args.loss_type == "cispo":
        shares["cispo_clip_ratio"] = _share((ratio > epsilon_high) & (advantages > 0.0), mask)
    elif args.loss_type == "vespo":
        shares["vespo/phi_seq_mean"] = _share(_vespo_weights(log_probs, old, mask, advantages, args), mask)
    elif resolve_loss_type(args.loss_type).by_token == "grpo":
        bounded = ratio if args.delta is None else ratio.clamp(max=args.delta)
        low = (bounded < 1.0 - args.epsilon) & (advantages < 0.0)
        high = (bounded > 1.0 + epsilon_high) & (advantages > 0.0)
        shares["clip_ratio/low_mean"], shares["clip_ratio/high_mean"] = _share(low, mask), _share(high, mask)
        shares["clip_ratio/region_mean"] = _share(low | high, mask)
        extremes["clip_ratio/low_min"] = min(_sequence_means(low, mask, accelerator), default=math.nan)
        extremes["clip_ratio/high_max"] = max(_sequence_means(high, mask, accelerator), default=math.nan)
    if args.beta != 0.0:
        difference = (inputs["ref_per_token_logps"] - log_probs).masked_fill(~mask, 0.0)
        kl = torch.expm1(difference) - difference
        if args.use_bias_correction_kl:
            kl = kl * _ratio(log_probs, old, mask, by_sequence=False)
        shares["kl"] = _share(kl, mask)
    if args.entropy_coef != 0.0:
        policy_loss = sums["policy_loss_sum"] + args.entropy_coef * sums["entropy_sum"]
        processes = accelerator.num_processes
        if args.loss_type == "bnpo":
            shares["policy_loss"] = policy_loss / mask.sum().clamp(min=1), policy_loss.new_ones(())
        else:
            shares["policy_loss"] = policy_loss, inputs["normalizers"].token_count / processes
    if entropy is not None:
        shares["entropy"] = entropy
    return _means(shares, accelerator) | extremes


def step_means(sums: dict[str, Tensor], args: SRPOTrainerConfig, *, has_policy: bool) -> dict[str, float]:
    """The means of ``summarize_metrics`` over an optimizer batch.

    ``sums`` are those of ``SRPOOutput.metrics``, and ``"valid_tokens"``, those of sequences that had no forward among
    them: they are in the policy branch. ``has_policy`` False: its loss was TRL's, and the sums are of the other branch.
    """
    totals = dict(sums)
    totals["policy_tokens"] = totals.pop("valid_tokens") - totals["sdpo_tokens"]
    means = sk.summarize_metrics(totals)
    if not has_policy:
        return {name: means[name] for name in _OF_DISTILLATION}
    if args.entropy_coef == 0.0 and not args.log_entropy:
        # Not computed.
        del means["srpo/entropy"]
    return means


_OF_DISTILLATION = (
    *("srpo/sdpo_loss", "srpo/sdpo_token_fraction", "srpo/teacher_entropy", "srpo/divergence"),
    *("srpo/dw_weight_mean", "srpo/dw_weight_std", "srpo/nonfinite_rows"),
)


def _ratio(log_probs: Tensor, old_log_probs: Tensor | None, moving: Tensor, *, by_sequence: bool) -> Tensor:
    """The ratio that the clips hold: ``[B, T]``, or ``[B, 1]`` of sequences; 1 where no token is ``moving``."""
    if old_log_probs is None:
        old_log_probs = log_probs
    log_ratio = (log_probs - old_log_probs).masked_fill(~moving, 0.0)
    if by_sequence:
        log_ratio = log_ratio.sum(1, keepdim=True) / moving.sum(1, keepdim=True).clamp(min=1)
    return log_ratio.exp()


def _vespo_weights(
    log_probs: Tensor, old_log_probs: Tensor | None, mask: Tensor, advantages: Tensor, args: SRPOTrainerConfig
) -> Tensor:
    """VESPO's weights of sequences, ``[B, 1]``; 1 where a sequence had no forward."""
    if old_log_probs is None:
        return torch.ones_like(log_probs[:, :1])
    scored = mask & (log_probs != 0.0).any(1, keepdim=True)
    log_ratio = (log_probs - old_log_probs).clamp(-20.0, 20.0).masked_fill(~scored, 0.0)
    log_w = log_ratio.sum(1, keepdim=True).clamp(math.log(1e-8), 20.0)
    positive = advantages[:, :1] >= 0.0
    k = torch.where(positive, args.vespo_k_pos, args.vespo_k_neg)
    scale = torch.where(positive, args.vespo_lambda_pos, args.vespo_lambda_neg)
    return torch.exp(k * log_w - scale * torch.expm1(log_w))


def _share(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The total and the count of ``[B, T]`` values of tokens, or ``[B, 1]`` of sequences."""
    if values.shape[1] == 1:
        return values.sum(), values.new_tensor(len(values), dtype=torch.float32)
    return (values * mask).sum(), mask.sum()


def _sequence_means(values: Tensor, mask: Tensor, accelerator: Any) -> list[float]:
    """The mean over each sequence of all processes, but those without a token."""
    means = values.squeeze(1).float() if values.shape[1] == 1 else (values * mask).sum(1) / mask.sum(1)
    return [mean for mean in accelerator.gather(means).tolist() if not math.isnan(mean)]


def _means(shares: dict[str, tuple[Tensor, Tensor]], accelerator: Any) -> dict[str, float]:
    if not shares:
        return {}
    rows = torch.stack([torch.stack([total.float(), count.float()]) for total, count in shares.values()])
    totals, counts = accelerator.reduce(rows, "sum").unbind(1)
    return dict(zip(shares, (totals / counts.clamp(min=1.0)).tolist(), strict=True))
