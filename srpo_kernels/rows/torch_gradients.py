"""The gradients of divergences in torch, on blocks of a few rows of both models' logits."""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_kernels.rows.contract import Coefficients, Statistics
from srpo_kernels.rows.spec import RowSpec
from srpo_kernels.rows.torch_blocks import (
    NATS,
    bits_per_unit,
    nats_of_gradient,
    normalize_,
)
from srpo_kernels.rows.torch_entries import entries, entry_numbers
from srpo_kernels.rows.torch_mixture import mix, to_mixture_ratio


def divergence_gradients(
    z: Tensor,
    y: Tensor,
    stats: Statistics,
    coefficients: Coefficients,
    spec: RowSpec,
    rows: slice,
    p: Tensor,
    work: list[Tensor],
) -> Tensor:
    """The gradients of all divergences of a block of rows, from both models' units; ``y`` is consumed."""
    assert stats.teacher_logsumexp is not None
    total, q, more, *_ = work
    _to_probabilities(z, stats.logsumexp, spec, out=p)
    total.zero_()
    if coefficients.by_reverse_kl is not None:
        _log_ratio(y, z, stats, spec, work=more, out=q)
        total.addcmul_(q.mul_(p), coefficients.by_reverse_kl[:, None], value=NATS)
    if coefficients.by_forward_kl is not None or spec.mixture is not None:
        _to_probabilities(y, stats.teacher_logsumexp, spec, out=q)
    if coefficients.by_forward_kl is not None:
        total.addcmul_(torch.sub(p, q, out=more), coefficients.by_forward_kl[:, None])
    if coefficients.by_divergence is None:
        return total
    assert stats.center is not None
    by = coefficients.by_divergence[:, None]
    if spec.mixture is not None:
        nats = nats_of_gradient(spec)
        to_mixture_ratio(p, q, spec.mixture, mix(p, q, spec.mixture, out=more), out=y)
        y.sub_((stats.center / nats).to(p.dtype)).mul_(p)
        return total.addcmul_(y, by, value=nats)
    _, gradient = entries(p.copy_(z), y, stats, spec, entry_numbers(spec, rows, z.dtype), work[1:])
    total.addcmul_(gradient, by)
    _to_probabilities(z, stats.logsumexp, spec, out=p)
    return total.addcmul_(p, by * stats.center.to(p.dtype), value=-1.0)


def _to_probabilities(units: Tensor, logsumexp: Tensor, spec: RowSpec, out: Tensor) -> None:
    normalize_(out.copy_(units), logsumexp, spec)
    out.exp2_()


def _log_ratio(y: Tensor, z: Tensor, stats: Statistics, spec: RowSpec, work: Tensor, out: Tensor) -> None:
    """The log-ratio less its mean, in bits, of both models' units.

    Each model's units less their log-sum-exp, the teacher's less the mean of the log-ratio as well: of a row that has
    one token alone both are exactly 0 there.
    """
    assert stats.teacher_logsumexp is not None and stats.mean_log_ratio is not None
    nats = spec.transform.nats_per_unit
    origin, teacher_origin = stats.logsumexp / nats, (stats.teacher_logsumexp - stats.mean_log_ratio) / nats
    high, teacher_high = origin.to(y.dtype), teacher_origin.to(y.dtype)
    low = ((origin - high) - (teacher_origin - teacher_high)).to(y.dtype)
    torch.sub(torch.sub(z, high, out=work), torch.sub(y, teacher_high, out=out), out=out)
    out.sub_(low).mul_(bits_per_unit(spec.transform, y.dtype))
