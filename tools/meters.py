"""What a call costs, counted from the operators that torch dispatches."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PRODUCTS = ("mm", "addmm")
# They leave memory as it is.
_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set")
# They write over their first operand and do not read it.
_OVERWRITES = ("copy", "fill", "zero")
# They touch no more of their first operand than they have indices for.
_LOOKUPS = ("gather", "index", "index_select", "scatter", "scatter_add", "index_put", "index_add")


class ProductMeter(TorchDispatchMode):
    """Multiply-adds of products of two matrices; torch's own counter misses ``addmm_``.

    Batches of products, those of ``columns`` of the head, are no such, and are an error where none are expected.
    """

    def __init__(self, *, columns: bool = False) -> None:
        super().__init__()
        self.multiply_adds, self.columns = 0, columns

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = _name(func)
        if name in _PRODUCTS:
            left, right = args[:2] if name == "mm" else args[1:3]
            self.multiply_adds += left.shape[0] * left.shape[1] * right.shape[1]
        elif name in ("bmm", "baddbmm", "addbmm", "addr") and not self.columns:
            raise NotImplementedError(f"{func} is a product that is not counted")
        return func(*args, **(kwargs or {}))


class OperatorMeter(TorchDispatchMode):
    """Bytes that operators move, but for products of matrices: every operand read once, every result written once.

    That is the least an operator can do that is not fused with another one. Views and buffers without content are free.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes_moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        result = func(*args, **(kwargs or {}))
        name = _name(func)
        if name not in _PRODUCTS + _ALLOCATIONS:
            results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
            self.bytes_moved += _bytes_moved(name, operands, results, in_place=func._schema.is_mutable)
        return result


class HostReads:
    """Where the host waits for an accelerator, or would: the lines of ``srpo_kernels`` that do, each time that they do.

    What reads a number, asks how many there are, or brings Python's numbers to a device: ``item``, ``tolist``,
    ``bool``, ``nonzero`` and a mask as an index, ``unique``, ``bincount``, ``torch.tensor``. On a CPU none of them
    waits, but there they are counted as well; what the kernels' interpreter does is not.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._modes: tuple[Any, ...] = ()

    def __enter__(self) -> HostReads:
        self._modes = _ReadingFunctions(self.lines), _ReadingOperators(self.lines)
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


# Operators that wait, and how often on CUDA.
_READING_OPERATORS = {
    "_local_scalar_dense": 1, "nonzero": 1, "masked_select": 1, "_unique2": 1, "unique_dim": 1, "equal": 1,
    "bincount": 2,
}  # fmt: skip
# Functions whose operators do not show it on a CPU.
_READING_FUNCTIONS = ("tolist", "numpy", "cpu", "new_tensor", "tensor", "as_tensor")


class _ReadingOperators(TorchDispatchMode):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = _name(func)
        count = _READING_OPERATORS.get(name, 0)
        if name in ("index", "index_put"):
            value = args[2] if name == "index_put" else None
            # A number at the places of one mask is a fill.
            masks = sum(x is not None and x.dtype == torch.bool for x in args[1])
            count = 0 if value is not None and value.ndim == 0 else masks
        elif name == "repeat_interleave" and isinstance(args[-1], Tensor):
            count = kwargs is None or kwargs.get("output_size") is None
        _note(self.lines, name, int(count))
        return func(*args, **(kwargs or {}))


class _ReadingFunctions(TorchFunctionMode):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        on_host = name in ("tensor", "as_tensor") and str((kwargs or {}).get("device")) == "cpu"
        _note(self.lines, name, int(name in _READING_FUNCTIONS and not on_host))
        return func(*args, **(kwargs or {}))


def _note(lines: list[str], name: str, count: int) -> None:
    """Add the innermost line of the library, unless the kernels' interpreter is at work."""
    if not count:
        return
    frames = [frame for frame in traceback.extract_stack() if not frame.filename.endswith(("meters.py",))]
    inner = next(i for i, frame in reversed(list(enumerate(frames))) if "/srpo_kernels/" in frame.filename)
    if not any("/triton/" in frame.filename for frame in frames[inner:]):
        at = frames[inner]
        lines += [f"{Path(at.filename).stem}.{at.name}: {name}"] * count


def _name(func: Any) -> str:
    """The operator's name; in place or not, it is the same."""
    return str(func.overloadpacket.__name__).rstrip("_")


def _bytes_moved(name: str, operands: list[Tensor], results: list[Tensor], in_place: bool) -> int:
    storages = {StorageWeakRef(x.untyped_storage()) for x in operands}
    if not in_place and any(StorageWeakRef(x.untyped_storage()) in storages for x in results):
        return 0
    read = sum(map(_size, operands))
    written = sum(map(_size, results))
    if name == "copy" and operands[0].data_ptr() == operands[1].data_ptr():
        # Triton's interpreter brings arguments back from where they are already.
        return 0
    if name in _OVERWRITES:
        read -= _size(operands[0])
    elif name in _LOOKUPS and in_place:
        indices = sum(map(_size, operands[1:]))
        read, written = 2 * indices, indices
    elif name in _LOOKUPS and not name.startswith(("scatter", "index_")):
        read += written - _size(operands[0])
    return read + written


def _size(tensor: Tensor) -> int:
    """Bytes of the elements that are there: a broadcast one counts once."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True) if tensor.layout == torch.strided else ()
    elements = 1
    for length, stride in pairs:
        elements *= length if stride or not length else 1
    return elements * tensor.element_size()
