"""Divergences from a mixture of both models in torch, on blocks of probabilities none of which is 0."""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_kernels.rows.mixture import Mixture
from srpo_kernels.rows.torch_blocks import NATS, dot


def mix(p: Tensor, q: Tensor, mixture: Mixture, out: Tensor) -> Tensor:
    """m into ``out``, by a step of alpha from the model that has the rest: 1 - alpha would round a small share."""
    start, end = (p, q) if mixture.alpha_of == "teacher" else (q, p)
    return torch.lerp(start, end, mixture.alpha, out=out)


def to_mixture_ratio(p: Tensor, q: Tensor, mixture: Mixture, m: Tensor, out: Tensor) -> Tensor:
    """r into ``out``, in bits where it has a logarithm; takes ``m``.

    The logarithm of the ratio, not the difference of logarithms: its error does not grow with the logits.
    """
    if not mixture.student_weight:
        return torch.div(q, m, out=out)
    torch.div(p, m, out=out).log2_()
    if mixture.ratio:
        out.add_(torch.div(q, m, out=m), alpha=mixture.ratio / NATS)
    return out


def mixture_block(
    p: Tensor, q: Tensor, mixture: Mixture, work: Tensor, out: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``E_p[r]`` as ``to_mixture_ratio`` counts it, ``KL(p || m)`` and ``KL(q || m)`` in bits, ``[n, 1]`` each.

    Those without a weight are None. ``work`` ends up with ``p r``.
    """
    m = mix(p, q, mixture, out=work)
    teacher_kl = _kl(q, m, out) if mixture.teacher_weight else None
    student_kl = _kl(p, m, out) if mixture.student_weight and mixture.ratio else None
    center = dot(p, to_mixture_ratio(p, q, mixture, m, out), out=work)
    if mixture.student_weight and not mixture.ratio:
        student_kl = center
    return center, student_kl, teacher_kl


def _kl(p: Tensor, m: Tensor, out: Tensor) -> Tensor:
    return dot(p, torch.div(p, m, out=out).log2_(), out=out)
