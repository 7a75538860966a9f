"""What Triton kernels do while the interpreter runs them: launches, memory accesses, products and barriers.

Plain loads and stores, block pointers and tensor descriptors all end in the masked loads and stores of the
interpreter's builder, so that wrapping those sees any kernel, whoever wrote it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.jit import TensorWrapper
from triton.tools.tensor_descriptor import TensorDescriptor

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class TensorArgument:
    """A tensor that a kernel was given.

    ``tensor`` is what the interpreter reads and writes: ``given``'s own memory on the CPU, for another device a copy of
    its storage in host memory.
    """

    name: str
    tensor: Tensor
    given: Tensor

    def index(self, address: int) -> tuple[int, ...] | None:
        """The index of an address; None: it is no element."""
        tensor = self.tensor
        rest = (address - tensor.data_ptr()) // tensor.element_size()
        if not tensor.numel() or rest < 0:
            return None
        index = [0] * tensor.ndim
        for dim in sorted(range(tensor.ndim), key=tensor.stride, reverse=True):
            if tensor.stride(dim):
                index[dim] = min(rest // tensor.stride(dim), tensor.shape[dim] - 1)
                rest -= index[dim] * tensor.stride(dim)
        return None if rest else tuple(index)

    def distance(self, address: int) -> int:
        """Bytes from the tensor's storage to an address; 0 inside."""
        begin, size = storage_begin(self.tensor), self.tensor.untyped_storage().nbytes()
        return max(begin - address, address - begin - size + 1, 0)


@dataclass(frozen=True)
class Launch:
    module: str
    kernel: str
    grid: tuple[int, int, int]
    tensors: tuple[TensorArgument, ...]

    @property
    def programs(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    def program_id(self, program: int) -> tuple[int, int, int]:
        rest, z = divmod(program, self.grid[2])
        x, y = divmod(rest, self.grid[1])
        return x, y, z

    def locate(self, address: int) -> tuple[str, tuple[int, ...]]:
        """The arguments that have an address, joined by a slash, and its index in the first of them.

        For an address that is in none: the nearest one, and the elements from its start.
        """
        found = [(argument.name, argument.index(address)) for argument in self.tensors]
        holders = [(name, index) for name, index in found if index is not None]
        if holders:
            return "/".join(name for name, _ in holders), holders[0][1]
        if not self.tensors:
            return "address", (address,)
        nearest = min(self.tensors, key=lambda argument: argument.distance(address))
        return nearest.name, ((address - nearest.tensor.data_ptr()) // nearest.tensor.element_size(),)


@dataclass(frozen=True)
class Access:
    """One load, store or atomic operation of one program; only lanes in ``mask`` touch memory."""

    program: int
    kind: Literal["load", "store", "atomic"]
    addresses: NDArray[np.int64]
    mask: Bools
    item_size: int


class Observer:
    """Hears every event of the launches inside `record`; programs are numbered in the order they run."""

    def launch_begins(self, launch: Launch) -> None:
        pass

    def program_begins(self, program: int) -> None:
        pass

    def access(self, access: Access) -> Bools | None:
        """Called before the access is made. Returns the lanes that may make it; None: all in the mask."""
        return None

    def dot(self, m: int, n: int, k: int) -> None:
        """A product ``[m, k] @ [k, n]``; m counts the rows of all its batches."""

    def barrier(self) -> None:
        pass

    def launch_ends(self, launch: Launch) -> None:
        """Called once every program has run; not for a launch that raised."""


def storage_begin(tensor: Tensor) -> int:
    """The address of the tensor's storage."""
    return tensor.untyped_storage().data_ptr()


def interpreting() -> bool:
    """Whether triton was first imported with TRITON_INTERPRET=1: kernels are interpreted from then on."""
    return isinstance(tl.sum, interpreter.InterpretedFunction)


@contextmanager
def record(*observers: Observer) -> Iterator[None]:
    """Tell the observers what kernels do inside; not to be nested.

    Raises:
        RuntimeError: kernels are compiled, not interpreted.
    """
    if not interpreting():
        raise RuntimeError("kernels are compiled here: set TRITON_INTERPRET=1 before the first import of triton")
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    recorder = _Recorder(observers)
    with ExitStack() as stack:
        for target, name, wrap in (
            (executor, "_init_args_hst", recorder.wrap_host_arguments),
            (builder, "set_grid_dim", recorder.wrap_grid),
            (builder, "set_grid_idx", recorder.wrap_program),
            (builder, "create_masked_load", recorder.wrap_load),
            (builder, "create_masked_store", recorder.wrap_store),
            (builder, "create_atomic_rmw", recorder.wrap_atomic_rmw),
            (builder, "create_atomic_cas", recorder.wrap_atomic_cas),
            (builder, "create_dot", recorder.wrap_dot),
            (builder, "create_barrier", recorder.wrap_barrier),
            (executor, "_restore_args_dev", recorder.wrap_restore),
        ):
            stack.enter_context(patch.object(target, name, wrap(getattr(target, name))))
        yield


class _Recorder:
    """Each ``wrap_`` method takes a function of the interpreter and returns one that also tells the observers."""

    def __init__(self, observers: tuple[Observer, ...]) -> None:
        self._observers = observers
        self._module = self._kernel = ""
        self._tensors: tuple[TensorArgument, ...] = ()
        self._launch = Launch("", "", (0, 0, 0), ())
        self._program = 0

    def wrap_host_arguments(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def host_arguments(executor: Any, args: Any, kwargs: Any) -> Any:
            host_args, host_kwargs = original(executor, args, kwargs)
            bind = inspect.signature(executor.fn).bind
            given, host = bind(*args, **kwargs).arguments, bind(*host_args, **host_kwargs).arguments
            self._module, self._kernel = executor.fn.__module__, executor.fn.__name__
            self._tensors = tuple(found for name in given for found in _find_tensors(name, host[name], given[name]))
            return host_args, host_kwargs

        return host_arguments

    def wrap_grid(self, original: Callable[..., None]) -> Callable[..., None]:
        def set_grid_dim(*grid: Any) -> None:
            original(*grid)
            x, y, z = map(int, grid)
            self._launch = Launch(self._module, self._kernel, (x, y, z), self._tensors)
            for observer in self._observers:
                observer.launch_begins(self._launch)

        return set_grid_dim

    def wrap_program(self, original: Callable[..., None]) -> Callable[..., None]:
        def set_grid_idx(x: int, y: int, z: int) -> None:
            original(x, y, z)
            _, y_size, z_size = self._launch.grid
            self._program = (x * y_size + y) * z_size + z
            for observer in self._observers:
                observer.program_begins(self._program)

        return set_grid_idx

    def wrap_load(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def masked_load(ptrs: Any, mask: Any, *rest: Any, **options: Any) -> Any:
            return original(ptrs, self._access("load", ptrs, mask), *rest, **options)

        return masked_load

    def wrap_store(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def masked_store(ptrs: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
            return original(ptrs, value, self._access("store", ptrs, mask), *rest, **options)

        return masked_store

    def wrap_atomic_rmw(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def atomic_rmw(operation: Any, ptr: Any, value: Any, mask: Any, *rest: Any) -> Any:
            return original(operation, ptr, value, self._access("atomic", ptr, mask), *rest)

        return atomic_rmw

    def wrap_atomic_cas(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def atomic_cas(ptr: Any, expected: Any, value: Any, *rest: Any) -> Any:
            everywhere = interpreter.TensorHandle(np.ones(ptr.data.shape, dtype=np.bool_), tl.int1)
            if not self._access("atomic", ptr, everywhere).data.all():
                # It takes no mask; reported as done, so that a kernel that waits for it goes on.
                return expected
            return original(ptr, expected, value, *rest)

        return atomic_cas

    def wrap_dot(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def dot(a: Any, b: Any, *rest: Any) -> Any:
            *rows, k = a.data.shape
            for observer in self._observers:
                observer.dot(int(np.prod(rows)), b.data.shape[-1], k)
            return original(a, b, *rest)

        return dot

    def wrap_barrier(self, original: Callable[[], None]) -> Callable[[], None]:
        def barrier() -> None:
            for observer in self._observers:
                observer.barrier()
            original()

        return barrier

    def wrap_restore(self, original: Callable[..., None]) -> Callable[..., None]:
        def restore(*args: Any) -> None:
            for observer in self._observers:
                observer.launch_ends(self._launch)
            original(*args)

        return restore

    def _access(self, kind: Literal["load", "store", "atomic"], ptrs: Any, mask: Any) -> Any:
        """Tell the observers of an access; returns the mask that is left of it."""
        # The interpreter passes a mask as a handle, or as a bare array for block pointers and descriptors.
        array = mask if isinstance(mask, np.ndarray) else mask.data
        lanes = np.broadcast_to(np.asarray(array, dtype=np.bool_), ptrs.data.shape)
        item_size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        access = Access(self._program, kind, ptrs.data.astype(np.int64), lanes, item_size)
        answers = [observer.access(access) for observer in self._observers]
        limits = [answer for answer in answers if answer is not None]
        return interpreter.TensorHandle(reduce(np.logical_and, limits, lanes), tl.int1) if limits else mask


def _find_tensors(name: str, host: Any, given: Any) -> Iterator[TensorArgument]:
    if isinstance(given, tuple):
        for number, (host_part, given_part) in enumerate(zip(host, given, strict=True)):
            yield from _find_tensors(f"{name}[{number}]", host_part, given_part)
    elif isinstance(given, (TensorDescriptor, TensorWrapper)):
        yield from _find_tensors(name, host.base, given.base)
    elif isinstance(given, Tensor):
        yield TensorArgument(name, host, given)
