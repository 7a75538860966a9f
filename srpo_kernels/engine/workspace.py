"""The buffer that logits live in.

Accelerators have a caching allocator. A CPU has none: a fresh buffer of some hundred MiB costs a page fault per 4 KiB
on every call, some percent of the whole loss. So each thread keeps its last CPU buffer until it needs a larger one;
nothing that is returned to a caller lives in it.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

# Elements, so that a kernel may load 16 bytes at a time in any row.
_ALIGNMENT = 16


class _Kept(threading.local):
    buffer: Tensor = torch.empty(0, dtype=torch.uint8)


_kept = _Kept()


def row_stride(width: int) -> int:
    """Elements from one row of ``width`` to the next: every row starts at a multiple of 64 bytes."""
    return -(-width // _ALIGNMENT) * _ALIGNMENT


def borrow(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer ``[rows, width]`` of unspecified content, valid until this thread's next call."""
    stride = row_stride(width)
    return _borrow(rows * stride * dtype.itemsize, device).view(dtype).view(rows, stride)[:, :width]


def _borrow(size: int, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.uint8, device=device)
    if len(_kept.buffer) < size:
        # The old buffer goes first: both at once would be a peak that no caller asked for.
        _kept.buffer = torch.empty(0, dtype=torch.uint8)
        _kept.buffer = torch.empty(size, dtype=torch.uint8)
    return _kept.buffer[:size]


def release() -> None:
    """Free this thread's buffer."""
    _kept.buffer = torch.empty(0, dtype=torch.uint8)
