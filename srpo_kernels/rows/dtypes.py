"""The dtypes that results are computed in."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest floating dtype of ``device``: fp32 on Apple's GPUs, and on those of Intel's that say so."""
    if device.type == "mps" or (device.type == "xpu" and not _xpu_has_fp64(device)):
        return torch.float32
    return torch.float64


@cache
def _xpu_has_fp64(device: torch.device) -> bool:
    return bool(torch.xpu.get_device_properties(device).has_fp64)


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any tensor is fp64, else fp32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
