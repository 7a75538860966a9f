"""One function per row kernel: arguments in, one program per row, results as the engine knows them."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from srpo_kernels.kernels.launch import on_device, row_launch, vendor_of
from srpo_kernels.kernels.row_grad import row_grad_kernel
from srpo_kernels.kernels.row_jsd import row_jsd_kernel
from srpo_kernels.kernels.row_stats import row_stats_kernel
from srpo_kernels.kernels.transform import Base2, Transform
from srpo_kernels.rows.contract import RowSpec
from srpo_kernels.rows.dtypes import wide_dtype
from srpo_kernels.rows.sums import ModelSums


def launch_row_stats(z: Tensor, y: Tensor | None, transform: Transform, target_ids: Tensor) -> list[ModelSums]:
    """The sums of the student, and of the teacher where there is one."""
    models, fields = (1, 5) if y is None else (2, 11)
    sums = z.new_empty(len(z), fields)
    vendor = vendor_of(z.device)
    launch = row_launch(models, vendor)
    if len(z):
        with on_device(z):
            row_stats_kernel[(len(z),)](
                z,
                z if y is None else y,
                target_ids.contiguous(),
                sums,
                z.stride(0),
                (z if y is None else y).stride(0),
                z.shape[1],
                transform.inner,
                transform.slope2,
                TEACHER=y is not None,
                SOFTCAP=transform.softcap,
                LANES=launch.lanes,
                VENDOR=vendor,
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
            )
    return ModelSums.unpack(sums)


def launch_row_jsd(z: Tensor, y: Tensor, lse: Tensor, teacher_lse: Tensor, spec: RowSpec) -> Tensor:
    """``KL(p || m)`` and ``KL(q || m)`` of rows as the kernel sees them, ``[n, 2]`` in bits."""
    transform, vendor = Transform.of(spec), vendor_of(z.device)
    student, teacher = Base2.of(lse, z.dtype), Base2.of(teacher_lse, z.dtype)
    shares = _shares(student, teacher, spec)
    launch = row_launch(2, vendor)
    kl2 = z.new_empty(len(z), 2)
    if len(z):
        with on_device(z):
            row_jsd_kernel[(len(z),)](
                z,
                y,
                torch.cat([student.high, teacher.high, shares.to(z.dtype)], dim=1),
                kl2,
                z.stride(0),
                y.stride(0),
                z.shape[1],
                transform.inner,
                transform.slope2,
                SOFTCAP=transform.softcap,
                LANES=launch.lanes,
                VENDOR=vendor,
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
            )
    return kl2


def finish_jsd(kl2: Tensor, logsumexp: Tensor, teacher_logsumexp: Tensor, spec: RowSpec) -> tuple[Tensor, Tensor]:
    """``KL(p || m)`` and ``KL(q || m)`` in nats, ``[n]``, from the sums of whole rows."""
    student, teacher = Base2.of(logsumexp, kl2.dtype), Base2.of(teacher_logsumexp, kl2.dtype)
    # The kernel's p and log p are off by what its log-sum-exp lacks; p sums to 1.
    kl2 = kl2 * torch.cat([student.correction, teacher.correction], dim=1)
    kl = (kl2 - torch.cat([student.low, teacher.low], dim=1)) * math.log(2.0)
    # Its mixture is off by the rounding of the shares: their mean, where the models are nearly equal.
    shares = _shares(student, teacher, spec)
    rounding = shares.to(kl2.dtype) / shares - 1.0
    rounding = (1.0 - spec.alpha) * rounding[:, :1] + spec.alpha * rounding[:, 1:]
    student_kl, teacher_kl = (kl + rounding.to(kl2.dtype)).unbind(1)
    return student_kl, teacher_kl


def launch_row_grad(
    z: Tensor,
    y: Tensor | None,
    spec: RowSpec,
    *,
    logsumexp: Tensor,
    teacher_logsumexp: Tensor | None,
    center: Tensor | None,
    by_p: Tensor,
    by_log: Tensor,
    by_divergence: Tensor,
    by_p_at_ids: Tensor,
    ids: Tensor,
    id_grads: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Launch ``row_grad_kernel``; coefficients ``[n]`` are per nat and do not know the transform's slope yet.

    ``center`` is that of ``DivergenceStats``; forward_kl's, which is 0, may be left out.
    """
    transform, vendor = Transform.of(spec), vendor_of(z.device)
    divergence = "none" if y is None else spec.divergence
    student = Base2.of(logsumexp, z.dtype)
    teacher = student if teacher_logsumexp is None else Base2.of(teacher_logsumexp, z.dtype)
    # What the log-sum-exps lack in fp32 scales a row's probabilities and shifts its log-ratios.
    by_log, by_divergence = by_log[:, None] * math.log(2.0), by_divergence[:, None]
    missing, extra = by_log * student.low, _shares(student, teacher, spec).to(z.dtype)
    if divergence == "forward_kl":
        by_divergence = by_divergence * (teacher.correction / student.correction)
    elif divergence == "reverse_kl" and center is not None and teacher_logsumexp is not None:
        # Each model's units less their log-sum-exp, the teacher's less the mean of the log-ratio as well: of a row that
        # has one token alone both are exactly 0 there.
        by_divergence = by_divergence * transform.slope
        origins = torch.cat([logsumexp, teacher_logsumexp - center], dim=1) / transform.slope
        extra = origins.to(z.dtype)
        low = origins - extra
        missing = missing + by_divergence * (low[:, :1] - low[:, 1:]).to(z.dtype)
    elif divergence == "jsd" and center is not None:
        by_divergence = by_divergence * math.log(2.0)
        missing = missing + by_divergence * (student.low + (center / math.log(2.0)).to(z.dtype))
    by_p, by_p_at_ids = by_p[:, None] - missing, by_p_at_ids[:, None] - missing
    scale = spec.scale * student.correction
    terms = [x * scale for x in (by_p, by_log, by_divergence, by_p_at_ids)]
    coefficients = torch.cat([student.high, teacher.high, *terms, extra], dim=1)
    out = z
    if dtype != z.dtype:
        out = torch.empty_strided(z.shape, z.stride(), dtype=dtype, device=z.device)
    launch = row_launch(1 if y is None else 2, vendor)
    if len(z):
        with on_device(z):
            row_grad_kernel[(len(z),)](
                z,
                z if y is None else y,
                out,
                ids.contiguous(),
                (id_grads * spec.scale).contiguous(),
                coefficients,
                z.stride(0),
                (z if y is None else y).stride(0),
                out.stride(0),
                z.shape[1],
                ids.shape[1],
                transform.inner,
                transform.slope2,
                DIVERGENCE=divergence,
                SOFTCAP=transform.softcap,
                LANES=launch.lanes,
                BLOCK_IDS=triton.next_power_of_2(ids.shape[1]),
                VENDOR=vendor,
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
            )
    return out


def _shares(student: Base2, teacher: Base2, spec: RowSpec) -> Tensor:
    """The models' shares in the mixture, ``[n, 2]`` and wide, for probabilities as the kernels see them."""
    missing = torch.cat([student.low, teacher.low], dim=1).to(wide_dtype(student.low.device))
    return torch.exp2(-missing) * missing.new_tensor([1.0 - spec.alpha, spec.alpha])
