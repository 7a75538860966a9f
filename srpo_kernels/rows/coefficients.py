"""From the upstream gradients of a row's statistics to the few numbers that make its dlogits."""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_kernels.rows.contract import Coefficients, RowGradients, Statistics
from srpo_kernels.rows.spec import RowSpec


def coefficients(stats: Statistics, gradients: RowGradients, spec: RowSpec, target_ids: Tensor) -> Coefficients:
    """What the upstream gradients of a row's statistics are for its logits.

    With g at ids and ``total = sum(g)``, less the log-sum-exp's gradient, dz at an id is ``g_k - total p_k``, from the
    log-prob: exactly 0 for the one token of a row that has no other. Elsewhere it is ``-total p_v``, or with a tail
    ``(g_tail - total tail) p_v / tail``: ``p_v / tail`` is the softmax of the tail alone, and is there where ``p_v``
    has underflown. An id that is no part of the support is one of the tail, and has that beside its g.
    """
    ids, log_probs, grads, in_support = _tokens(stats, gradients, target_ids)
    total = grads.sum(1) if ids.shape[1] else torch.zeros_like(stats.log_probs)
    p, log_sum = log_probs.exp(), stats.logsumexp
    if gradients.logsumexp is not None:
        # p_v is the log-sum-exp's gradient, and what a log-prob's takes away everywhere.
        total = total - gradients.logsumexp
    by_log = None if gradients.entropy is None else -gradients.entropy
    if gradients.log_tail is None:
        outside, at_ids = -total, grads - total[:, None] * p
    else:
        assert stats.tail_logsumexp is not None and stats.log_tail is not None and in_support is not None
        log_sum = stats.tail_logsumexp
        total = total + gradients.log_tail
        outside = gradients.log_tail - total * stats.log_tail.exp()
        of_tail = outside[:, None] * (log_probs - stats.log_tail[:, None]).clamp_max(0.0).exp()
        at_ids = grads + torch.where(in_support, -total[:, None] * p, of_tail)
    # A backend refuses the gradient of an entropy that it has not computed.
    if by_log is not None and stats.entropy is not None:
        at_ids = at_ids + by_log[:, None] * p * (log_probs + stats.entropy[:, None])
        if gradients.log_tail is not None and stats.log_tail is not None:
            by_log = by_log * stats.log_tail.exp()
    kls = {"forward_kl": gradients.forward_kl, "reverse_kl": gradients.reverse_kl}
    by_divergence = gradients.divergence
    if by_divergence is not None and spec.kl is not None:
        beside = kls[spec.kl]
        kls[spec.kl] = by_divergence if beside is None else beside + by_divergence
        by_divergence = None
    elif by_divergence is not None and spec.mixture is not None:
        by_divergence = by_divergence * spec.mixture.slope
    return Coefficients(ids, at_ids, outside, log_sum, by_log, kls["forward_kl"], kls["reverse_kl"], by_divergence)


def _tokens(
    stats: Statistics, gradients: RowGradients, target_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Tokens whose log-probs have gradients: ids, log-probs, gradients, whether in the support; ``[n, K]`` each.

    The last is None where the tail has no gradient. A token that is in several lists is one: its gradients add up, and
    it has a negative id everywhere else.
    """
    support, target = gradients.support_log_probs, gradients.log_probs
    if support is None and gradients.log_tail is not None and stats.support_log_probs is not None:
        # The tail is what is not these.
        support = torch.zeros_like(stats.support_log_probs)
    lists = [
        (stats.support_ids, stats.support_log_probs, support),
        (stats.sampled_ids, stats.sampled_log_probs, gradients.sampled_log_probs),
        (target_ids[:, None], stats.log_probs[:, None], None if target is None else target[:, None]),
    ]
    present = [(i, x, g) for i, x, g in lists if i is not None and x is not None and g is not None]
    if not present:
        nothing = stats.log_probs[:, None][:, :0]
        return target_ids[:, None][:, :0], nothing, nothing, None
    ids, log_probs, grads = present[0] if len(present) == 1 else (torch.cat(x, 1) for x in zip(*present, strict=True))
    in_support = None
    if gradients.log_tail is not None:
        of_support = 0 if support is None else support.shape[1]
        in_support = (torch.arange(ids.shape[1], device=ids.device) < of_support).expand(ids.shape)
    if len(present) > 1:
        # The first list that has a token keeps it. A list has it once at most.
        ids, order = ids.sort(dim=1, stable=True)
        log_probs, grads = (x.gather(1, order) for x in (log_probs, grads))
        in_support = None if in_support is None else in_support.gather(1, order)
        total = grads.clone()
        for by in range(1, len(present)):
            total[:, :-by] += grads[:, by:] * (ids[:, by:] == ids[:, :-by])
        ids[:, 1:] = ids[:, 1:].masked_fill(ids[:, 1:] == ids[:, :-1], -1)
        grads = total.masked_fill(ids < 0, 0.0)
    return ids, log_probs, grads, in_support
