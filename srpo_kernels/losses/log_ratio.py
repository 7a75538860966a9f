"""Log-ratios of two policies at the sampled token, and what is estimated from them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from srpo_kernels.checks import refuse_name

KLType = Literal["k1", "k2", "k3", "k1+", "k3+", "k3_bounded", "k3_weighted"]

# The exponential of a larger log-ratio, times an advantage and a weight, could leave fp32: its gradient would be NaN.
LARGEST_LOG_RATIO = 80.0
_IS_LOG_RATIO_CLAMP = 20.0
_LARGEST_BOUNDED_KL = 10.0


def bounded(log_ratio: Tensor, clamp: float | None) -> Tensor:
    """What may enter an exponential; the gradient is 0 beyond the bound."""
    bound = LARGEST_LOG_RATIO if clamp is None else min(LARGEST_LOG_RATIO, clamp)
    return log_ratio.clamp(-bound, bound)


def ref_kl(log_probs: Tensor, ref_log_probs: Tensor, log_ratio: Tensor, kl_type: KLType, clamp: float | None) -> Tensor:
    """Estimates of KL(policy || reference) from one sample, ``[n]``; ``log_ratio`` is that to the old policy.

    k1, k2, and k3 of a bounded log-ratio: http://joschu.net/blog/kl-approx.html. A plus has the value of the one and
    the gradient of k2, as in verl; ``"k3_bounded"`` is verl's ``"low_var_kl"``, at most 10; ``"k3_weighted"`` is
    ``rho * k3``, unbiased for samples of the old policy: DeepSeek-V3.2 (arXiv 2512.02556), section 3.1; no log-ratio in
    it is beyond 40.
    """
    difference = ref_log_probs - log_probs
    k2 = 0.5 * difference.square()
    kept = bounded(difference, clamp)
    k3 = torch.expm1(kept) - kept
    match kl_type:
        case "k1":
            return -difference
        case "k2":
            return k2
        case "k3":
            return k3
        case "k1+":
            return -difference.detach() + (k2 - k2.detach())
        case "k3+":
            return k3.detach() + (k2 - k2.detach())
        case "k3_bounded":
            return k3.clamp(max=_LARGEST_BOUNDED_KL)
        case "k3_weighted":
            # The product of two exponentials.
            half = 0.5 * LARGEST_LOG_RATIO
            kept = kept.clamp(-half, half)
            return log_ratio.clamp(-half, half).exp() * (torch.expm1(kept) - kept)
        case unknown:
            refuse_name("kl_type", unknown)


def clipped_is_weights(log_probs: Tensor, old_log_probs: Tensor | None, clip: float | None) -> Tensor:
    """``kappa = min(rho, clip)``, detached, ``[n]``: the correction for distilling tokens of an older policy."""
    if old_log_probs is None or clip is None:
        return torch.ones_like(log_probs)
    log_ratio = (log_probs.detach() - old_log_probs).clamp(-_IS_LOG_RATIO_CLAMP, _IS_LOG_RATIO_CLAMP)
    return log_ratio.exp().clamp(max=clip)
