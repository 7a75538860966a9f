"""Divergences between student p and teacher q over a few tokens; those over the vocabulary are the backends'."""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_kernels.rows.entries import EntryDivergence
from srpo_kernels.rows.mixture import Divergence


def support_divergence(
    log_p: Tensor,
    log_q: Tensor,
    log_p_tail: Tensor | None,
    log_q_tail: Tensor | None,
    divergence: Divergence,
    alpha: Tensor | float,
    clip: Tensor | float | None = None,
    *,
    renormalize: bool,
) -> Tensor:
    """The divergence over K log-probs ``[n, K]`` and, with tails ``[n]``, one more bucket; ``[n]``.

    ``renormalize``: both models over the K. ``alpha`` and ``clip`` as in ``EntryDivergence``. Differentiable in
    ``log_p`` and ``log_p_tail``.
    """
    if log_p_tail is not None and log_q_tail is not None:
        log_p = torch.cat([log_p, log_p_tail[:, None]], dim=1)
        log_q = torch.cat([log_q, log_q_tail[:, None]], dim=1)
    elif renormalize:
        log_p, log_q = log_p.log_softmax(1), log_q.log_softmax(1)
    own = EntryDivergence.of(divergence, alpha, clip, log_p)
    log_shares = [share.log().to(log_p) for share in (own.student_share, own.teacher_share)]
    log_m = torch.logaddexp(log_p + log_shares[0], log_q + log_shares[1])
    by_student, by_teacher, bound = own.student_weight.to(log_p), own.teacher_weight.to(log_p), own.clip.to(log_p)
    entries = by_student * log_p.exp() * (log_p - log_m) + by_teacher * log_q.exp() * (log_q - log_m)
    return torch.minimum(entries, bound).sum(1)


def over_support(log_probs: Tensor, support_log_probs: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs ``[n]`` renormalised over the tokens of ``support_log_probs`` ``[n, S]``, and the entropy over these.

    The row's own token belongs to them; ``position`` ``[n]`` says which of the S it is, negative for none. The third
    result is the log of the probability that all of them have.
    """
    contained = position >= 0
    # The same number as among the others: of a row that has one token alone every gradient is exactly 0.
    listed = support_log_probs.gather(1, position.clamp_min(0)[:, None]).squeeze(1)
    log_probs = torch.where(contained, listed, log_probs)
    # Relative to the largest: where these tokens have hardly any probability, a log-prob is large.
    largest = torch.maximum(support_log_probs.amax(1), log_probs).detach()
    own, others = log_probs - largest, support_log_probs - largest[:, None]
    mass = others.logsumexp(1)
    mass = torch.where(contained, mass, torch.logaddexp(mass, own))
    own, others = (own - mass).clamp_max(0.0), others - mass[:, None]
    beside = torch.where(contained, 0.0, own.exp() * own)
    return own, -(others.exp() * others).sum(1) - beside, mass + largest


def sampled_divergence(log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """``sg(log p_t - log q_t) * log p_t``: the score-function surrogate of reverse KL at the sampled token, ``[n]``."""
    return (log_probs.detach() - teacher_log_probs) * log_probs
