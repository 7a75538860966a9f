"""Triton's interpreter without what it works out again for every value: most of its time on blocks of this size.

Types, shapes, constants and the functions of ``tl`` are made once, and operands that already agree go to the builder as
they are. What an operation computes, and what it refuses, stays the interpreter's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, lru_cache
from types import FunctionType
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_agree = TritonSemantic.binary_op_type_checking_impl
_match_shapes = TritonSemantic.broadcast_impl_value
_assert_no_overflow = TritonSemantic.binary_op_sanitize_overflow_impl
_make_constant = TritonSemantic.scalar_constant
_find_numpy_dtype = interpreter._get_np_dtype
_has_room = interpreter._validate_np_data_size
_make_block_type = tl.block_type.__init__
_make_tensor = tl.tensor.__init__

# Two of the same are of that type together, in any operation. By name, with the bytes of an element.
_CLOSED = {"fp32": 4, "int1": 1, "int32": 4, "int64": 8}
# The types a number would have alone, by the type it gets from the other operand.
_MET_BY = {"fp32": {"fp32", "int32"}, "int32": {"int32"}, "int64": {"int32"}}

# The builder's functions of two operands: of floats and of integers.
_OPERATORS = {
    "add": ("fadd", "add"),
    "sub": ("fsub", "sub"),
    "mul": ("fmul", "mul"),
    "truediv": ("fdiv", None),
    "lt": ("fcmpOLT", "icmpSLT"),
    "le": ("fcmpOLE", "icmpSLE"),
    "gt": ("fcmpOGT", "icmpSGT"),
    "ge": ("fcmpOGE", "icmpSGE"),
    "eq": ("fcmpOEQ", "icmpEQ"),
    "ne": ("fcmpUNE", "icmpNE"),
    "and": (None, "and"),
    "or": (None, "or"),
}
_COMPARISONS = {"lt", "le", "gt", "ge", "eq", "ne"}
_OFFSETS = {"int32", "int64"}


def install() -> None:
    """Put the functions below in the place of the interpreter's own."""
    # A value's shape and elements: constants. A block has its own.
    tl.dtype.of_value = _value_shape(tl.float32)
    tl.block_type.__init__ = _init_block_type
    tl.block_type.with_element_ty = _with_element_type
    tl.tensor.__init__ = _init_tensor
    TritonSemantic.binary_op_type_checking_impl = _operands
    TritonSemantic.broadcast_impl_value = _shapes
    TritonSemantic.binary_op_sanitize_overflow_impl = _sanitize_overflow
    TritonSemantic.scalar_constant = _scalar_constant
    interpreter.InterpreterBuilder.create_splat = _create_splat
    interpreter._get_np_dtype = _numpy_dtype
    interpreter._validate_np_data_size = _fits
    interpreter._patch_attr = _give_semantic
    # Once for all: the interpreter does it in every call of a kernel's function.
    patched = interpreter._patch_lang(FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core}))
    # What undoes it, an object since Triton 3.6: one that has nothing to undo.
    interpreter._patch_lang = lambda _: type(patched)()
    for name in _OPERATORS:
        setattr(tl.tensor, f"__{name}__", _operator(name, reflected=False))
        if name not in _COMPARISONS:
            setattr(tl.tensor, f"__r{name}__", _operator(name, reflected=True))


@cache
def _block_shape(sizes: tuple[int, ...]) -> tuple[Any, int, tuple[Any, Any], str]:
    """A block's shape, the same object for all blocks of these sizes, its elements, both of a value, and its name."""
    made = tl.block_type.__new__(tl.block_type)
    _make_block_type(made, tl.float32, list(sizes))
    return made.shape, made.numel, _value_shape(made), str(made.shape)


def _value_shape(type: Any) -> tuple[Any, Any]:
    made = tl.tensor.__new__(tl.tensor)
    _make_tensor(made, None, type)
    return made.shape, made.numel


def _init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    self.element_ty = element_ty
    self.sizes = tuple([size if type(size) is int else tl.core._unwrap_if_constexpr(size) for size in shape])
    self.shape, self.numel, self.of_value, name = _block_shape(self.sizes)
    self.name = f"<{name}, {element_ty}>"


def _with_element_type(self: Any, scalar_ty: Any) -> Any:
    """The same object for all blocks of these sizes and elements; their type has them."""
    blocks = vars(scalar_ty).setdefault("blocks", {})
    found = blocks.get(self.sizes)
    if found is None:
        found = blocks[self.sizes] = tl.block_type(scalar_ty, self.sizes)
    return found


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle = handle
    self.type = type
    self.dtype = type.scalar
    self.shape, self.numel = type.of_value


def _operator(name: str, reflected: bool) -> Callable[[Any, Any], Any]:
    """An operator of two values; of different types, or of two blocks of different shapes: the interpreter's."""
    general = getattr(tl.tensor, f"__{'r' * reflected}{name}__")
    of_floats, of_integers = (operation and f"create_{operation}" for operation in _OPERATORS[name])
    creates = {"fp32": of_floats, "int32": of_integers, "int64": of_integers}
    if name in ("and", "or"):
        creates["int1"] = of_integers
    builder = interpreter.interpreter_builder

    def operate(x: Any, y: Any) -> Any:
        dtype = x.dtype.name
        create = creates.get(dtype)
        if create is not None and not builder.options.debug:
            other = y if isinstance(y, tl.tensor) else _number(y, dtype)
            if other is not None and other.dtype.name == dtype and (whole := _together(x, other)):
                operands = (other.handle, x.handle) if reflected else (x.handle, other.handle)
                made = getattr(builder, create)(*operands)
                return tl.tensor(made, whole.with_element_ty(tl.int1) if name in _COMPARISONS else whole)
        elif name == "add" and x.dtype.is_ptr():
            offset = y if isinstance(y, tl.tensor) else _number(y, "int32")
            if offset is not None and offset.dtype.name in _OFFSETS and (whole := _together(x, offset)):
                return tl.tensor(builder.create_addptr(x.handle, offset.handle), whole.with_element_ty(x.dtype))
        return general(x, y)

    return operate


def _together(x: Any, y: Any) -> Any:
    """The type of the one whose shape both take; None: neither is a scalar, and their shapes differ."""
    if x.shape is y.shape or not y.shape:
        return x.type
    return None if x.shape else y.type


def _number(value: Any, dtype: str) -> Any:
    """A number that an operand of this type makes one of its own; None: it is none."""
    if isinstance(value, tl.constexpr):
        value = value.value
    return _constant(value, dtype) if type(value) in (int, float) else None


@lru_cache(maxsize=None, typed=True)
def _constant(value: Any, dtype: str) -> Any:
    semantic = interpreter.interpreter_semantic
    if semantic.to_tensor_type(value).name not in _MET_BY.get(dtype, ()):
        return None
    return semantic.scalar_constant(value, tl.dtype(dtype))


def _scalar_constant(self: TritonSemantic, value: Any, dtype: Any) -> Any:
    shared = dtype is not None and dtype.name in _CLOSED
    return _shared_constant(value, dtype) if shared else _make_constant(self, value, dtype)


@lru_cache(maxsize=None, typed=True)
def _shared_constant(value: Any, dtype: Any) -> Any:
    return _make_constant(interpreter.interpreter_semantic, value, dtype)


def _fits(array: np.ndarray[Any, Any], dtype: Any) -> bool:
    return array.itemsize <= _CLOSED.get(dtype.name, 0) or _has_room(array, dtype)


def _operands(self: TritonSemantic, lhs: Any, rhs: Any, *options: Any, **named: Any) -> Any:
    if isinstance(lhs, tl.tensor):
        dtype = lhs.dtype.name
        other = rhs if isinstance(rhs, tl.tensor) else _number(rhs, dtype)
        if other is not None and dtype in _CLOSED and other.dtype.name == dtype:
            return _shapes(self, lhs, other)
    return _agree(self, lhs, rhs, *options, **named)


def _shapes(self: TritonSemantic, lhs: Any, rhs: Any) -> Any:
    if lhs.shape is rhs.shape:
        return lhs, rhs
    if not rhs.shape:
        return lhs, _splat(self, rhs, lhs.type)
    if not lhs.shape:
        return _splat(self, lhs, rhs.type), rhs
    return _match_shapes(self, lhs, rhs)


def _splat(self: TritonSemantic, value: Any, like: Any) -> Any:
    block = like.with_element_ty(value.dtype)
    return tl.tensor(self.builder.create_splat(block, value.handle), block)


def _create_splat(_: interpreter.InterpreterBuilder, block: Any, value: interpreter.TensorHandle) -> Any:
    data = np.full(block.sizes, value.data, dtype=_numpy_dtype(value.dtype))
    return interpreter.TensorHandle(data, value.dtype.scalar)


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
