"""Divergences between student p and teacher q over a few tokens; those over the vocabulary are the backends'."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from srpo_kernels.checks import refuse_name
from srpo_kernels.rows.contract import Divergence
from srpo_kernels.rows.mixture import has_mixture, mixture_of


def support_divergence(
    log_p: Tensor,
    log_q: Tensor,
    log_p_tail: Tensor | None,
    log_q_tail: Tensor | None,
    divergence: Divergence,
    alpha: float,
    *,
    renormalize: bool,
) -> Tensor:
    """The divergence over K log-probs ``[n, K]`` and, with tails ``[n]``, one more bucket; ``[n]``.

    ``renormalize``: both models over the K. Differentiable in ``log_p`` and ``log_p_tail``.
    """
    if log_p_tail is not None and log_q_tail is not None:
        log_p = torch.cat([log_p, log_p_tail[:, None]], dim=1)
        log_q = torch.cat([log_q, log_q_tail[:, None]], dim=1)
    elif renormalize:
        log_p, log_q = log_p.log_softmax(1), log_q.log_softmax(1)
    if has_mixture(divergence):
        mixture = mixture_of(divergence, alpha)
        log_other, log_own = (log_p, log_q) if mixture.alpha_of == "teacher" else (log_q, log_p)
        log_m = torch.logaddexp(log_other + math.log1p(-alpha), log_own + math.log(alpha))
        return mixture.divergence(
            _kl(log_p, log_m) if mixture.student_weight else None,
            _kl(log_q, log_m) if mixture.teacher_weight else None,
        )
    match divergence:
        case "forward_kl":
            return _kl(log_q, log_p)
        case "reverse_kl":
            return _kl(log_p, log_q)
        case unknown:
            refuse_name("divergence", unknown)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(1)


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
