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
from srpo_kernels.integrations.trl.config import SRPOTrainerConfig, resolve_loss_type


def micro_batch_metrics(
    inputs: dict[str, Any],
    out: sk.SRPOOutput,
    mask: Tensor,
    args: SRPOTrainerConfig,
    accelerator: Any,
    *,
    training: bool,
) -> dict[str, float]:
    """What TRL logs of the loss of a micro-batch; its entropy only with a bonus and without distillation.

    ``inputs`` are the micro-batch, ``out.log_probs`` and ``mask``, the valid tokens, are ``[B, T]``. Clip ratios are
    over all valid tokens, or over all sequences where a sequence has one ratio; those that are distilled are not
    clipped.
    """
    log_probs, sums = out.log_probs, out.metrics
    advantages = inputs["advantages"].masked_fill(inputs["sdpo_mask"], 0.0)[:, None]
    ratio = _ratio(log_probs, inputs.get("old_per_token_logps"), mask & (advantages != 0.0), args)
    epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high

    # The total and the count of each mean, in this process.
    shares: dict[str, tuple[Tensor, Tensor]] = {}
    extremes: dict[str, float] = {}
    if args.loss_type == "cispo":
        shares["cispo_clip_ratio"] = _share((ratio > epsilon_high) & (advantages > 0.0), mask)
    elif resolve_loss_type(args.loss_type)[0] in ("grpo", "luspo"):
        bounded = ratio if args.delta is None else ratio.clamp(max=args.delta)
        low = (bounded < 1.0 - args.epsilon) & (advantages < 0.0)
        high = (bounded > 1.0 + epsilon_high) & (advantages > 0.0)
        shares["clip_ratio/low_mean"], shares["clip_ratio/high_mean"] = _share(low, mask), _share(high, mask)
        shares["clip_ratio/region_mean"] = _share(low | high, mask)
        extremes["clip_ratio/low_min"] = min(_sequence_means(low, mask, accelerator), default=math.nan)
        extremes["clip_ratio/high_max"] = max(_sequence_means(high, mask, accelerator), default=math.nan)
    if args.beta != 0.0:
        difference = (inputs["ref_per_token_logps"] - log_probs).masked_fill(~mask, 0.0)
        shares["kl"] = _share(torch.expm1(difference) - difference, mask)
    if args.entropy_coef != 0.0:
        policy_loss = sums["policy_loss_sum"] + args.entropy_coef * sums["entropy_sum"]
        steps = args.steps_per_generation / args.gradient_accumulation_steps if training else 1.0
        # Those of an optimizer step, the mean over the generation batch.
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / steps
        shares["policy_loss"] = policy_loss, tokens / accelerator.num_processes
        if args.method == "grpo":
            shares["entropy"] = sums["entropy_sum"], sums["entropy_tokens"]
    return _means(shares, accelerator) | extremes


def step_means(sums: dict[str, Tensor], token_count: Tensor, args: SRPOTrainerConfig) -> dict[str, float]:
    """The means of ``summarize_metrics`` over an optimizer batch.

    ``sums`` are those of ``SRPOOutput.metrics``; ``token_count`` that of the step's ``Normalizers``, which also has the
    sequences that had no forward: they are in the policy branch.
    """
    totals = sums | {"policy_tokens": token_count.to(sums["sdpo_tokens"]) - sums["sdpo_tokens"]}
    means = sk.summarize_metrics(totals)
    if args.entropy_coef == 0.0:
        # Computed for the bonus alone.
        del means["srpo/entropy"]
    return means


def _ratio(log_probs: Tensor, old_log_probs: Tensor | None, moving: Tensor, args: SRPOTrainerConfig) -> Tensor:
    """The ratio that the clips hold: ``[B, T]``, or ``[B, 1]`` of sequences; 1 where no token is ``moving``."""
    if old_log_probs is None:
        old_log_probs = log_probs
    log_ratio = (log_probs - old_log_probs).masked_fill(~moving, 0.0)
    if args.importance_sampling_level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / moving.sum(1, keepdim=True).clamp(min=1)
    return log_ratio.exp()


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
