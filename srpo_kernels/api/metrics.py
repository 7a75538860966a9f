"""The means that a log wants, from the sums and counts of ``SRPOOutput.metrics``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from srpo_kernels.api.types import SRPOOutput
from srpo_kernels.checks import FLOATING, INTEGER, require_shape, require_tensor
from srpo_kernels.losses.srpo import METRICS


def summarize_metrics(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Means over tokens, for a log, from the sums and counts of ``SRPOOutput.metrics``.

    A loss is per token of its branch. Entropies, divergences and KL estimates are in nats per token. Clip
    fractions and KL estimates are over the policy tokens whose log-prob was computed. ``srpo/nonfinite_rows``
    is a count. A mean over no token is 0. One transfer to the host.

    Args:
        metrics: the dict of an ``SRPOOutput``, or the sums of several over micro-batches and ranks.

    Raises:
        TypeError: no dict of tensors, such as the ``SRPOOutput`` itself.
        ValueError: a key is missing, or a tensor is no scalar.
    """
    if not isinstance(metrics, Mapping):
        hint = ": give its metrics" if isinstance(metrics, SRPOOutput) else ""
        raise TypeError(f"metrics must be the dict SRPOOutput.metrics, got {type(metrics).__name__}{hint}")
    missing = [name for name in METRICS if name not in metrics]
    if missing:
        raise ValueError(f"metrics must have every key of SRPOOutput.metrics, {missing} not found")
    device = None
    for name in METRICS:
        value = require_tensor(f"metrics[{name!r}]", metrics[name], FLOATING + INTEGER, device)
        require_shape(f"metrics[{name!r}]", value, [()], "a scalar")
        device = value.device
    values = torch.stack([metrics[name].detach() for name in METRICS]).tolist()
    totals = dict(zip(METRICS, values, strict=True))
    policy, scored, sdpo = totals["policy_tokens"], totals["scored_policy_tokens"], totals["sdpo_tokens"]
    weight_mean = _mean(totals["dw_weight_sum"], sdpo)
    weight_variance = _mean(totals["dw_weight_sq_sum"], sdpo) - weight_mean**2
    return {
        "srpo/policy_loss": _mean(totals["policy_loss_sum"], policy),
        "srpo/sdpo_loss": _mean(totals["sdpo_loss_sum"], sdpo),
        "srpo/sdpo_token_fraction": _mean(sdpo, sdpo + policy),
        "srpo/active_fraction": _mean(totals["active_rows"], sdpo + policy),
        "srpo/clip_low_fraction": _mean(totals["clip_low_count"], scored),
        "srpo/clip_high_fraction": _mean(totals["clip_high_count"], scored),
        "srpo/dual_clip_fraction": _mean(totals["dual_clip_count"], scored),
        "srpo/ref_kl": _mean(totals["ref_kl_sum"], scored),
        "srpo/approx_kl": _mean(totals["approx_kl_sum"], scored),
        "srpo/entropy": _mean(totals["entropy_sum"], totals["entropy_tokens"]),
        "srpo/teacher_entropy": _mean(totals["teacher_entropy_sum"], sdpo),
        "srpo/divergence": _mean(totals["divergence_sum"], sdpo),
        "srpo/dw_weight_mean": weight_mean,
        # Rounding can take the variance of equal weights below zero.
        "srpo/dw_weight_std": max(weight_variance, 0.0) ** 0.5,
        "srpo/rollout_weight": _mean(totals["rollout_weight_sum"], totals["rollout_tokens"]),
        "srpo/rollout_clipped_fraction": _mean(totals["rollout_clipped_count"], totals["rollout_tokens"]),
        "srpo/rollout_dropped_fraction": _mean(totals["rollout_dropped_count"], totals["rollout_tokens"]),
        "srpo/nonfinite_rows": totals["nonfinite_rows"],
    }


def _mean(total: float, count: float) -> float:
    return total / count if count else 0.0
