"""The rows in Triton: one kernel per pass, one program per row, from fp32 logits.

A whole row is a slice of the vocabulary like another. A pass of sums leaves the logits as they are; the gradient's pass
reads them once more and writes dlogits over them, or into a buffer of the products' dtype.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from srpo_kernels.kernels.gradient import by_model, entry_numbers, gradient_numbers, mixture_shares
from srpo_kernels.kernels.launch import elements_launch, mixture_terms, on_device, row_launch, vendor_of
from srpo_kernels.kernels.row_entries import row_entries_kernel
from srpo_kernels.kernels.row_grad import row_grad_kernel
from srpo_kernels.kernels.row_mixture import row_mixture_kernel
from srpo_kernels.kernels.row_stats import row_stats_kernel
from srpo_kernels.kernels.row_units import units_kernel
from srpo_kernels.kernels.scale import scale_kernel
from srpo_kernels.kernels.transform import Base2, Transform
from srpo_kernels.rows.contract import Coefficients, Dlogits, ModelSums, Scratch, Statistics
from srpo_kernels.rows.spec import LOWEST, LogitTransform, RowSpec
from srpo_kernels.rows.sums import unpack


def scratch(vocab_size: int, device: torch.device) -> Scratch:
    """Nothing of a row's size."""
    return Scratch(0, 0)


def slope(transform: LogitTransform) -> float:
    """As the kernels round it."""
    return Transform.of(transform).slope


def sums(
    logits: Tensor,
    teacher_logits: Tensor | None,
    transform: LogitTransform,
    *,
    target_ids: Tensor,
    teacher_transform: LogitTransform | None = None,
) -> list[ModelSums]:
    """One launch for one or both models' logits."""
    y = logits if teacher_logits is None else teacher_logits
    models, fields = (1, 5) if teacher_logits is None else (2, 11)
    out = logits.new_empty(len(logits), fields)
    launched, vendor = Transform.of(transform), vendor_of(logits.device)
    of_teacher = transform if teacher_logits is None or teacher_transform is None else teacher_transform
    launch = row_launch(models, vendor)
    if len(logits):
        with on_device(logits):
            row_stats_kernel[(len(logits),)](
                logits,
                y,
                target_ids.contiguous(),
                out,
                logits.stride(0),
                y.stride(0),
                logits.shape[1],
                launched.inner,
                launched.slope2,
                TEACHER=models == 2,
                SOFTCAP=launched.softcap,
                TEACHER_SOFTCAP=of_teacher.softcap is not None,
                LANES=launch.lanes,
                VENDOR=vendor,
                **launch.options,
            )
    return unpack(out)


def units(logits: Tensor, transform: LogitTransform) -> Tensor:
    """As the passes round them: a log-prob is the difference of a unit and what a pass makes of all of them."""
    launched, vendor, launch = Transform.of(transform), vendor_of(logits.device), elements_launch()
    if not launched.softcap:
        return logits.clamp_min(LOWEST)
    raw = logits.contiguous()
    out = torch.empty_like(raw)
    if len(out.view(-1)):
        with on_device(raw):
            units_kernel[(triton.cdiv(raw.numel(), launch.lanes),)](
                raw, out, raw.numel(), launched.inner, VENDOR=vendor, BLOCK=launch.lanes, **launch.options
            )
    return out


def scaled(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """One pass, whatever the dtype."""
    values, launch = values.contiguous(), elements_launch()
    out = values if dtype == values.dtype else torch.empty_like(values, dtype=dtype)
    if values.numel():
        with on_device(values):
            scale_kernel[(triton.cdiv(values.numel(), launch.lanes),)](
                values, factor, out, values.numel(), BLOCK=launch.lanes, **launch.options
            )
    return out


def support_sums(
    logits: Tensor, transform: LogitTransform, *, target_ids: Tensor, support_ids: Tensor
) -> tuple[ModelSums, Tensor]:
    """The support is taken out of the logits for as long as the others are summed."""
    (ids, here), (target, target_here) = (_within(x, logits) for x in (support_ids, target_ids[:, None]))
    own = logits.gather(1, ids)
    targets = units(logits.gather(1, target), transform).masked_fill(~target_here, LOWEST).squeeze(1)
    # Under a softcap an excluded token has a logit, unlike one that is taken out: above the mark of that.
    kept = own.clamp_min(0.5 * LOWEST)
    logits.scatter_(1, ids, kept)
    # An id of another slice stands at one of this slice that may be in the support as well: the least value counts.
    logits.scatter_reduce_(1, ids, kept.masked_fill(here, LOWEST), "amin")
    (complement,) = sums(logits, None, transform, target_ids=target_ids)
    logits.scatter_(1, ids, own)
    return complement._replace(target=targets), units(own, transform).masked_fill(~here, LOWEST)


def _within(ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest ids of the slice, and which are the very ones."""
    nearest = ids.clamp(0, logits.shape[1] - 1)
    return nearest, nearest == ids


def divergence_sums(logits: Tensor, teacher_logits: Tensor, stats: Statistics, spec: RowSpec, *, first: bool) -> Tensor:
    """The kernel's are in bits, and off by what the log-sum-exps lack in fp32: both are put right here."""
    mixture = spec.mixture
    assert stats.teacher_logsumexp is not None
    if mixture is None:
        numbers = entry_numbers(stats, spec, logits.dtype)
        return _compare(row_entries_kernel, logits, teacher_logits, numbers, logits.new_empty(len(logits), 2), spec)
    models, wanted = Base2.of([stats.logsumexp, stats.teacher_logsumexp], logits.dtype), mixture_terms(mixture)
    shares = mixture_shares(models, mixture)
    rounded, correction = shares.to(logits.dtype), models.correction
    out = logits.new_empty(len(logits), sum(wanted.values()))
    _compare(row_mixture_kernel, logits, teacher_logits, torch.cat([models.high, rounded], dim=1), out, spec, **wanted)
    names = [name for name in ("STUDENT_KL", "TEACHER_KL") if wanted[name]]
    of_kls = slice(int(not wanted["STUDENT_KL"]), 1 + int(wanted["TEACHER_KL"]))
    # The kernel's p and log p are off by what its log-sum-exp lacks; p sums to 1.
    kls = out[:, : len(names)] * correction[:, of_kls]
    if first:
        # The kernel's mixture is off by the rounding of the shares: their mean, where the models are nearly equal.
        rounding = by_model(rounded / shares - 1.0, mixture).sum(1, keepdim=True)
        kls = kls - models.low[:, of_kls] + (rounding / math.log(2.0)).to(out.dtype)
    columns = dict(zip(names, (kls * math.log(2.0)).split(1, dim=1), strict=True))
    center = columns["STUDENT_KL"] if wanted["STUDENT_KL"] else torch.zeros_like(kls[:, :1])
    if wanted["OVERLAP"]:
        center = center + mixture.ratio * (out[:, -1:] * correction.prod(1, keepdim=True))
    return torch.cat([center, mixture.divergence(*map(columns.get, ("STUDENT_KL", "TEACHER_KL")))], dim=1)


def _compare(
    kernel: Any, logits: Tensor, teacher_logits: Tensor, numbers: Tensor, out: Tensor, spec: RowSpec, **wanted: bool
) -> Tensor:
    """Launch a kernel that writes a few sums over both models' rows into ``out``."""
    transform, vendor = Transform.of(spec.transform), vendor_of(logits.device)
    launch = row_launch(2, vendor)
    if len(logits):
        with on_device(logits):
            kernel[(len(logits),)](
                logits,
                teacher_logits,
                numbers,
                out,
                logits.stride(0),
                teacher_logits.stride(0),
                logits.shape[1],
                transform.inner,
                transform.slope2,
                **wanted,
                SOFTCAP=transform.softcap,
                TEACHER_SOFTCAP=spec.teacher_transform.softcap is not None,
                LANES=launch.lanes,
                VENDOR=vendor,
                **launch.options,
            )
    return out


def whole_rows(
    logits: Tensor,
    teacher_logits: Tensor | None,
    spec: RowSpec,
    *,
    target_ids: Tensor,
    entropy: bool,
    gradient: frozenset[str],
) -> None:
    """Sums do as well."""


def dlogits_(
    logits: Tensor,
    teacher_logits: Tensor | None,
    stats: Statistics,
    coefficients: Coefficients,
    spec: RowSpec,
    *,
    out: Tensor,
) -> Dlogits:
    """One pass, which reads the logits before it writes over them."""
    ids, at_ids = coefficients.ids, coefficients.at_ids
    if not ids.shape[1]:
        # A kernel has one id at least: that of another slice.
        ids = torch.full_like(coefficients.outside, -1, dtype=torch.int64)[:, None]
        at_ids = at_ids.new_zeros(len(ids), 1)
    z, y = logits, teacher_logits if coefficients.compares else None
    transform, vendor = Transform.of(spec.transform), vendor_of(z.device)
    terms, numbers = gradient_numbers(stats, coefficients, spec)
    launch = row_launch(1 if y is None else 2, vendor)
    if len(z):
        with on_device(z):
            row_grad_kernel[(len(z),)](
                z,
                z if y is None else y,
                out,
                ids.contiguous(),
                (at_ids * spec.transform.scale).contiguous(),
                numbers,
                z.stride(0),
                (z if y is None else y).stride(0),
                out.stride(0),
                z.shape[1],
                ids.shape[1],
                transform.inner,
                transform.slope2,
                **terms,
                SOFTCAP=transform.softcap,
                TEACHER_SOFTCAP=(spec.transform if y is None else spec.teacher_transform).softcap is not None,
                LANES=launch.lanes,
                BLOCK_IDS=triton.next_power_of_2(ids.shape[1]),
                VENDOR=vendor,
                **launch.options,
            )
    return Dlogits(out, None)
