from __future__ import annotations

import os
from types import FunctionType

import numpy as np
import pytest
import torch
from hypothesis import settings

# Before transformers is imported: tests never ask a network for a model.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before triton is imported: without a GPU its kernels run in the interpreter. Compilers get a process of their own.
if not torch.accelerator.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton.language as tl
from triton.runtime import interpreter

from benchmarks.interpreted import interpreting


def _fused_multiply_add(
    _: object, x: interpreter.TensorHandle, y: interpreter.TensorHandle, z: interpreter.TensorHandle
) -> interpreter.TensorHandle:
    """Round once, as every GPU does; the interpreter rounds the product too."""
    exact = x.data.astype(np.float64) * y.data + z.data
    return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)


interpreter.InterpreterBuilder.create_fma = _fused_multiply_add

_dot = interpreter.InterpreterBuilder.create_dot


def _dot_in_order(
    builder: interpreter.InterpreterBuilder,
    a: interpreter.TensorHandle,
    b: interpreter.TensorHandle,
    addend: interpreter.TensorHandle,
    *rest: object,
) -> interpreter.TensorHandle:
    """Add one product after the other: the machine's BLAS sums a row in an order that depends on the other rows."""
    total = interpreter.TensorHandle(np.zeros_like(addend.data), addend.dtype)
    for k in range(a.data.shape[-1]):
        column = interpreter.TensorHandle(a.data[..., k : k + 1], a.dtype)
        row = interpreter.TensorHandle(b.data[..., k : k + 1, :], b.dtype)
        total = _dot(builder, column, row, total, *rest)
    return interpreter.TensorHandle(total.data + addend.data, addend.dtype)


interpreter.InterpreterBuilder.create_dot = _dot_in_order

if interpreting():
    # Once for all: the interpreter does it in every call of a kernel's function, two thirds of a small kernel's time.
    interpreter._patch_lang(FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda _: interpreter._LangPatchScope()

# `pytest --hypothesis-profile=deep` searches longer.
settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("deep", max_examples=500, deadline=None)
settings.load_profile("ci")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same torch seed."""
    torch.manual_seed(0)
