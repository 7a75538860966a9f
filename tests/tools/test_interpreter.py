"""The interpreter of the tests rounds as a GPU does, and its shortcuts change nothing else."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

from srpo_kernels.kernels import launch

pytestmark = pytest.mark.interpreter


@triton.jit
def multiply_add_kernel(x_ptr, y_ptr, z_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x, y, z = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets), tl.load(z_ptr + offsets)
    tl.store(out_ptr + offsets, tl.fma(x, y, z))


@triton.jit
def round_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets).to(tl.bfloat16))


@triton.jit
def dot_kernel(x_ptr, y_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x, y = tl.load(x_ptr + m[:, None] * K + k[None, :]), tl.load(y_ptr + k[:, None] * N + n[None, :])
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(x, y, input_precision="ieee"))


@triton.jit
def mixed_kernel(bytes_ptr, halves_ptr, floats_ptr, out_ptr, scale, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    small, half, x = tl.load(bytes_ptr + m), tl.load(halves_ptr + n), tl.load(floats_ptr + n)
    sums = small[:, None] + n[None, :]
    quotients = sums / 4
    out = tl.where(sums > 3, quotients + half[None, :] * x, 1 - (half * scale)[None, :]) + (sums // 3 % 2)
    tl.store(out_ptr + m[:, None] * N + n[None, :], out + 0.1)


@triton.jit
def increment_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets) + 1)


@triton.jit
def operate_kernel(x_ptr, y_ptr, out_ptr, OPERATE: tl.constexpr, NUMBER: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x, y, scalar = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets), tl.load(y_ptr)
    tl.store(out_ptr + offsets, OPERATE(x, y))
    tl.store(out_ptr + BLOCK + offsets, OPERATE(x, scalar))
    tl.store(out_ptr + 2 * BLOCK + offsets, OPERATE(scalar, x))
    tl.store(out_ptr + 3 * BLOCK + offsets, OPERATE(x, NUMBER))
    tl.store(out_ptr + 4 * BLOCK + offsets, OPERATE(NUMBER, x))
    tl.store(out_ptr + 5 * BLOCK, OPERATE(scalar, NUMBER))


@triton.jit
def call_kernel(x_ptr, CALL: tl.constexpr):
    CALL(x_ptr)


def test_a_multiply_add_rounds_once() -> None:
    x = torch.randn(64)
    out = torch.empty(64)
    multiply_add_kernel[(1,)](x, x, -(x * x), out, BLOCK=64)
    assert torch.equal(out, (x.double().square() - (x * x).double()).float())


def test_bf16_is_the_nearest_one() -> None:
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 3.4e38, 1e-40, 1 + 2**-8, 1 + 3 * 2**-8])
    x = torch.cat([torch.randn(56), special])
    out = torch.empty(64, dtype=torch.bfloat16)
    round_kernel[(1,)](x, out, BLOCK=64)
    assert torch.equal(out, x.bfloat16())
    round_kernel[(1,)](torch.full((64,), torch.nan), out, BLOCK=64)
    assert out.isnan().all()


def test_a_row_of_a_dot_does_not_depend_on_the_others() -> None:
    x, y = torch.randn(32, 64), torch.randn(64, 32)
    out, turned, alone = torch.empty(32, 32), torch.empty(32, 32), torch.empty(32, 32)
    dot_kernel[(1,)](x, y, out, M=32, N=32, K=64)
    dot_kernel[(1,)](x.flip(0), y, turned, M=32, N=32, K=64)
    dot_kernel[(1,)](torch.cat([x[5:6], torch.zeros(31, 64)]), y, alone, M=32, N=32, K=64)
    assert torch.equal(turned.flip(0), out)
    assert torch.equal(alone[0], out[5])
    torch.testing.assert_close(out, x @ y)


def test_operands_of_different_types_and_shapes_meet() -> None:
    m, n = torch.arange(4, dtype=torch.int8), torch.arange(8)
    half, x = torch.randn(8).half(), torch.randn(8)
    out = torch.empty(4, 8)
    mixed_kernel[(1,)](m, half, x, out, 3.0, M=4, N=8)
    sums = m[:, None].int() + n[None, :].int()
    # A number takes the type of what it meets.
    expected = torch.where(sums > 3, sums.float() / 4 + half.float() * x, (1 - half * 3.0).float()[None, :])
    torch.testing.assert_close(out, expected + (sums // 3 % 2) + 0.1)


ARITHMETIC = [operator.add, operator.sub, operator.mul, operator.truediv]
COMPARISONS = [operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne]
TYPES = [torch.float32, torch.int32, torch.int64, torch.float16]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("operate", [*ARITHMETIC, *COMPARISONS, operator.and_, operator.or_])
def test_operators_of_blocks_scalars_and_numbers(operate: Callable[[Any, Any], Tensor], dtype: torch.dtype) -> None:
    x, y = torch.randint(-4, 5, (8,)).to(dtype), torch.tensor([3, -2, 1, 4, 2, -1, 3, 5]).to(dtype)
    number: float = 2
    if operate is operator.truediv:
        x = x + 5
    if dtype.is_floating_point:
        x, number = x / 4, 0.5
    if operate in (operator.and_, operator.or_) and dtype.is_floating_point:
        with pytest.raises(InterpreterError, match="invalid operands"):
            operate_kernel[(1,)](x, y, x, OPERATE=operate, NUMBER=number, BLOCK=8)
        return
    parts = operate(x, y), operate(x, y[0]), operate(y[0], x), operate(x, number), operate(number, x)
    expected = torch.cat([*parts, operate(y[:1], number)])
    out = torch.empty_like(expected)
    operate_kernel[(1,)](x, y, out, OPERATE=operate, NUMBER=number, BLOCK=8)
    assert torch.equal(out, expected)


def test_a_number_that_does_not_fit_makes_the_type_wider() -> None:
    x = torch.tensor([0, torch.iinfo(torch.int32).max], dtype=torch.int32)
    out = torch.ones(2 * 5 + 1, dtype=torch.bool)
    operate_kernel[(1,)](x, x, out, OPERATE=operator.ge, NUMBER=2**40, BLOCK=2)
    assert out[6:].tolist() == [False, False, True, True, False]
    # As an fp32 number it would be equal.
    x = torch.full((2,), 1e-40)
    operate_kernel[(1,)](x, x, out, OPERATE=operator.eq, NUMBER=1e-40, BLOCK=2)
    assert out.tolist() == [True] * 6 + [False] * 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda _: tl.arange(0, 8) + tl.arange(0, 4), "Cannot make_shape_compatible"),
        (lambda pointer: pointer + 1.0, "invalid operands"),
        (lambda pointer: pointer + tl.full([8], 1.0, tl.float32), "invalid operands"),
        (lambda pointer: pointer + pointer, "cannot add pointers together"),
        (lambda pointer: pointer * 2, "invalid operands"),
        (lambda _: tl.arange(0, 8) * 2**40, "out of range"),
        (lambda _: tl.arange(0, 8) < "8", "cannot convert"),
        (lambda _: tl.full([8], 1.0, None), "dtype must be specified"),
    ],
)
def test_what_does_not_go_together_is_refused(call: Callable[[Any], object], message: str) -> None:
    with pytest.raises(InterpreterError, match=message):
        call_kernel[(1,)](torch.zeros(8), CALL=call)


def test_a_type_of_blocks_has_its_elements_and_sizes() -> None:
    block = tl.block_type(tl.float32, [4, tl.constexpr(8)])
    assert str(block) == "<['4', '8'], fp32>"
    assert block != block.with_element_ty(tl.int1) == tl.block_type(tl.int1, [4, 8])
    assert block.with_element_ty(tl.int1) != tl.block_type(tl.float32, [8, 4]).with_element_ty(tl.int1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_integers_wrap(dtype: torch.dtype) -> None:
    x = torch.tensor([0, torch.iinfo(dtype).max], dtype=dtype)
    out = torch.empty_like(x)
    increment_kernel[(1,)](x, out, BLOCK=2)
    assert out.tolist() == [1, torch.iinfo(dtype).min]


def test_a_numpy_that_it_does_not_run_with_is_named() -> None:
    launch.check_interpreter("3.7.1", "2.4.6")
    launch.check_interpreter("3.6.0", "2.3.5")
    with pytest.raises(ImportError, match=r"triton 3\.6\.0 does not run with numpy 2\.10\.0; install triton>=3\.7"):
        launch.check_interpreter("3.6.0", "2.10.0")
