"""Triton's interpreter without what it works out again for every value: most of its time on blocks of this size.

Types, shapes and the functions of ``tl`` are made once, and operands that already agree are not converted. What an
operation computes, and what it refuses, stays the interpreter's own.
"""

from __future__ import annotations

import inspect
from functools import cache
from types import FunctionType
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_agree = TritonSemantic.binary_op_type_checking_impl
_match_shapes = TritonSemantic.broadcast_impl_value
_assert_no_overflow = TritonSemantic.binary_op_sanitize_overflow_impl
_find_numpy_dtype = interpreter._get_np_dtype
_make_block_type = tl.block_type.__init__
_make_tensor = tl.tensor.__init__

# Two of the same are of that type together, in any operation.
_CLOSED = frozenset({"fp32", "int1", "int32", "int64"})


def install() -> None:
    """Put the functions below in the place of the interpreter's own."""
    tl.block_type.__init__ = _init_block_type
    tl.tensor.__init__ = _init_tensor
    TritonSemantic.binary_op_type_checking_impl = _operands
    TritonSemantic.broadcast_impl_value = _shapes
    TritonSemantic.binary_op_sanitize_overflow_impl = _sanitize_overflow
    interpreter._get_np_dtype = _numpy_dtype
    interpreter._patch_attr = _give_semantic
    # Once for all: the interpreter does it in every call of a kernel's function.
    patched = interpreter._patch_lang(FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core}))
    # What undoes it, an object since Triton 3.6: one that has nothing to undo.
    interpreter._patch_lang = lambda _: type(patched)()


@cache
def _block_shape(sizes: tuple[int, ...]) -> tuple[Any, int]:
    """A block's shape, the same object for all blocks of these sizes, and its elements."""
    made = tl.block_type.__new__(tl.block_type)
    _make_block_type(made, tl.float32, list(sizes))
    return made.shape, made.numel


def _init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    self.element_ty = element_ty
    self.shape, self.numel = _block_shape(tuple([tl.core._unwrap_if_constexpr(size) for size in shape]))
    self.name = f"<{self.shape}, {element_ty}>"


@cache
def _value_shape(sizes: tuple[int, ...]) -> tuple[Any, Any]:
    """A value's shape and elements: constants."""
    made = tl.tensor.__new__(tl.tensor)
    _make_tensor(made, None, tl.block_type(tl.float32, list(sizes)) if sizes else tl.float32)
    return made.shape, made.numel


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle = handle
    self.type = type
    self.dtype = type.scalar
    self.shape, self.numel = _value_shape(tuple(type.shape.values) if type.is_block() else ())


def _operands(self: TritonSemantic, lhs: Any, rhs: Any, *options: Any, **named: Any) -> Any:
    if isinstance(lhs, tl.tensor):
        if isinstance(rhs, tl.tensor):
            if lhs.dtype.name in _CLOSED and lhs.dtype.name == rhs.dtype.name:
                return _shapes(self, lhs, rhs)
        elif type(rhs) is float and lhs.dtype.name == "fp32":
            return _shapes(self, lhs, self.scalar_constant(rhs, lhs.dtype))
    return _agree(self, lhs, rhs, *options, **named)


def _shapes(self: TritonSemantic, lhs: Any, rhs: Any) -> Any:
    return (lhs, rhs) if lhs.shape is rhs.shape else _match_shapes(self, lhs, rhs)


def _sanitize_overflow(self: TritonSemantic, *operands: Any) -> None:
    # Without it, all that is computed for the assertion is thrown away.
    if self.builder.options.debug:
        _assert_no_overflow(self, *operands)


_numpy_dtypes: dict[str, np.dtype[Any]] = {}


def _numpy_dtype(dtype: Any) -> np.dtype[Any]:
    scalar = dtype.scalar
    found = _numpy_dtypes.get(scalar.name)
    if found is None:
        found = _numpy_dtypes[scalar.name] = _find_numpy_dtype(scalar)
    return found


def _give_semantic(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    function = inspect.unwrap(member)

    def call(*args: Any, **named: Any) -> Any:
        named["_semantic"] = interpreter.interpreter_semantic
        return function(*args, **named)

    scope.set_attr(owner, name, call)
