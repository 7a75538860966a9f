"""Log-ratios of two policies at the sampled token, and what is estimated from them."""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_kernels.checks import refuse_name
from srpo_kernels.losses.options import KLType

# The exponential of a larger log-ratio, times an advantage and a weight, could leave fp32: its gradient would be NaN.
LARGEST_LOG_RATIO = 80.0
_IS_LOG_RATIO_CLAMP = 20.0


def bounded(log_ratio: Tensor, clamp: float | None) -> Tensor:
    """What may enter an exponential; the gradient is 0 beyond the bound."""
    bound = LARGEST_LOG_RATIO if clamp is None else min(LARGEST_LOG_RATIO, clamp)
    return log_ratio.clamp(-bound, bound)


def ref_kl(log_probs: Tensor, ref_log_probs: Tensor, kl_type: KLType, clamp: float | None) -> Tensor:
    """Estimates of KL(policy || reference) from one sample, ``[n]``: k1, k2, and k3 of a bounded log-ratio.

    Source: http://joschu.net/blog/kl-approx.html.
    """
    difference = ref_log_probs - log_probs
    match kl_type:
        case "k1":
            return -difference
        case "k2":
            return 0.5 * difference.square()
        case "k3":
            difference = bounded(difference, clamp)
            return torch.expm1(difference) - difference
        case unknown:
            refuse_name("kl_type", unknown)


def clipped_is_weights(log_probs: Tensor, old_log_probs: Tensor | None, clip: float | None) -> Tensor:
    """``kappa = min(rho, clip)``, detached, ``[n]``: the correction for distilling tokens of an older policy."""
    if old_log_probs is None or clip is None:
        return torch.ones_like(log_probs)
    log_ratio = (log_probs.detach() - old_log_probs).clamp(-_IS_LOG_RATIO_CLAMP, _IS_LOG_RATIO_CLAMP)
    return log_ratio.exp().clamp(max=clip)
