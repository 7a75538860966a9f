"""Triton's interpreter with the roundings of a GPU, whatever the machine that it runs on."""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_dot = InterpreterBuilder.create_dot
_truncate = InterpreterBuilder.create_fp_trunc


def install() -> None:
    """Put the functions below in the place of the interpreter's own."""
    InterpreterBuilder.create_fma = _multiply_add
    InterpreterBuilder.create_dot = _dot_in_order
    InterpreterBuilder.create_fp_trunc = _round


def _multiply_add(_: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    """Round once; the interpreter rounds the product too."""
    exact = x.data.astype(np.float64) * y.data + z.data
    return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)


def _dot_in_order(
    builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, addend: TensorHandle, *rest: object
) -> TensorHandle:
    """Add one product after the other: the machine's BLAS sums a row in an order that depends on the other rows."""
    total = TensorHandle(np.zeros_like(addend.data), addend.dtype)
    for k in range(a.data.shape[-1]):
        column, row = TensorHandle(a.data[..., k : k + 1], a.dtype), TensorHandle(b.data[..., k : k + 1, :], b.dtype)
        total = _dot(builder, column, row, total, *rest)
    return TensorHandle(total.data + addend.data, addend.dtype)


def _round(builder: InterpreterBuilder, x: TensorHandle, dtype: tl.dtype) -> TensorHandle:
    """Round to the nearest bf16; the interpreter cuts bits off."""
    if dtype.scalar != tl.bfloat16:
        return _truncate(builder, x, dtype)
    bits = np.array(x.data).view(np.uint32)
    # To the even one of two that are as near; a NaN's bits would carry into its sign.
    nearest = np.where(np.isnan(x.data), bits | 0x400000, bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return TensorHandle(nearest.astype(np.uint16), tl.bfloat16)
