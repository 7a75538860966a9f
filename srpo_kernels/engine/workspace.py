"""The buffer that logits live in.

Accelerators have a caching allocator. A CPU has none: a fresh buffer of some hundred MiB costs a page fault per 4 KiB
on every call, some percent of the whole loss. So each thread keeps its last CPU buffer until it needs a larger one;
nothing that is returned to a caller lives in it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Elements, so that a kernel may load 16 bytes at a time in any row.
_ALIGNMENT = 16


class _Kept(threading.local):
    buffer: Tensor | None = None


_kept = _Kept()


def row_stride(width: int) -> int:
    """Elements from one row of ``width`` to the next: every row starts at a multiple of 64 bytes."""
    return -(-width // _ALIGNMENT) * _ALIGNMENT


@contextmanager
def borrowed(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """A buffer ``[rows, width]`` of unspecified content, which belongs to the caller until the context ends.

    A call within another, from a hook of it, say, gets a buffer of its own.
    """
    stride = row_stride(width)
    size = rows * stride * dtype.itemsize
    if not size:
        # What is kept is for who needs some.
        yield torch.empty(rows, width, dtype=dtype, device=device)
        return
    buffer = None
    if device.type == "cpu":
        buffer, _kept.buffer = _kept.buffer, None
    if buffer is None or len(buffer) < size:
        # The old buffer goes first: both at once would be a peak that no caller asked for.
        buffer = None
        # In inference mode it would be of no use to a later call outside of it.
        with torch.inference_mode(False):
            buffer = torch.empty(size, dtype=torch.uint8, device=device)
    try:
        yield buffer[:size].view(dtype).view(rows, stride)[:, :width]
    finally:
        if device.type == "cpu" and (_kept.buffer is None or len(_kept.buffer) < len(buffer)):
            _kept.buffer = buffer


def release() -> None:
    """Free this thread's buffer."""
    _kept.buffer = None
