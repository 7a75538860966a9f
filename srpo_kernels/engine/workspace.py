"""The buffer that logits live in.

Accelerators have a caching allocator. A CPU has none: a fresh buffer of some hundred MiB costs a page fault per 4 KiB
on every call, some percent of the whole loss. So each thread keeps its last CPU buffer until it needs a larger one;
nothing that is returned to a caller lives in it.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class _Kept(threading.local):
    buffer: Tensor = torch.empty(0, dtype=torch.uint8)


_kept = _Kept()


def borrow(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A flat buffer of unspecified content, valid until this thread's next call."""
    if device.type != "cpu":
        return torch.empty(elements, dtype=dtype, device=device)
    size = elements * dtype.itemsize
    if len(_kept.buffer) < size:
        # The old buffer goes first: both at once would be a peak that no caller asked for.
        _kept.buffer = torch.empty(0, dtype=torch.uint8)
        _kept.buffer = torch.empty(size, dtype=torch.uint8)
    return _kept.buffer[:size].view(dtype)


def release() -> None:
    """Free this thread's buffer."""
    _kept.buffer = torch.empty(0, dtype=torch.uint8)
