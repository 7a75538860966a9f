"""What a step logs, from sums over its micro-batches and processes."""

from __future__ import annotations

from torch import Tensor

import srpo_kernels as sk


def step_means(sums: dict[str, Tensor], token_count: Tensor, config: sk.SRPOConfig) -> dict[str, float]:
    """The means of ``summarize_metrics``, and TRL's names for those that it logs too.

    ``sums`` are those of ``SRPOOutput.metrics``; ``token_count`` that of the step's ``Normalizers``, which also has the
    sequences that had no forward: they are in the policy branch.
    """
    totals = sums | {"policy_tokens": token_count.to(sums["sdpo_tokens"]) - sums["sdpo_tokens"]}
    means = sk.summarize_metrics(totals)
    if config.loss_type in ("grpo", "gspo"):
        low, high = means["srpo/clip_low_fraction"], means["srpo/clip_high_fraction"]
        means |= {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high}
    if config.kl_coef != 0.0:
        means["kl"] = means["srpo/ref_kl"]
    # Computed for the bonus alone.
    entropy = means.pop("srpo/entropy")
    if config.entropy_coef != 0.0:
        means["entropy"] = entropy
    return means
