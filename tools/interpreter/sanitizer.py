"""A memory sanitizer for Triton kernels: what a GPU may get wrong, found in the interpreter.

The interpreter runs programs one after the other and each program in order, so that a race never shows in its numbers.
Here every address is remembered with the programs that touched it, and two accesses that a GPU may make in either order
are a finding. Reductions are not counted as barriers: whether one has any is the compiler's choice.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from tools.interpreter.launches import Access, Bools, Launch, Observer, record, storage_begin

Ints = NDArray[np.int64]
# Programs of a launch, counted from 1: 0 is nobody.
Programs = NDArray[np.int32]

# Linux's flag, which Python's mmap module does not name: pages that nobody touches need no memory to back them.
_MAP_NORESERVE = 0x4000


class Hazard(Enum):
    OUTSIDE = "program {0} accesses {element}, which is in no tensor of the launch"
    WRITE_WRITE = "programs {0} and {1} write {element}"
    READ_WRITE = "program {0} reads {element}, which program {1} writes"
    UNWRITTEN = "{element} is never written"
    READ_OWN_WRITE = "program {0} reads {element} after writing it, with no barrier between"
    WRITTEN_TWICE = "program {0} writes {element} twice, with no barrier between"
    OVERWRITTEN_READ = "program {0} writes {element} after another lane read it, with no barrier between"


@dataclass
class Finding:
    """The first occurrence of a hazard in a kernel's tensor argument, and how many there are.

    ``element`` is an index of the tensor; of ``OUTSIDE`` it is the distance in elements from the start of the nearest
    tensor. ``argument`` names all arguments that have the element, as in ``x_ptr/out_ptr``.
    """

    hazard: Hazard
    kernel: str
    programs: tuple[tuple[int, int, int], ...]
    argument: str
    element: tuple[int, ...]
    count: int

    def __str__(self) -> str:
        element = f"{self.argument}[{', '.join(map(str, self.element))}]"
        return f"{self.kernel}: {self.hazard.value.format(*self.programs, element=element)} ({self.count} in all)"


class SanitizerError(AssertionError):
    def __init__(self, findings: Sequence[Finding]) -> None:
        super().__init__("\n".join(map(str, findings)))
        self.findings = tuple(findings)


@contextmanager
def sanitize(
    *,
    exact_views: bool = True,
    outputs: Mapping[str, Collection[str]] | None = None,
    allow: Collection[Hazard] = (),
) -> Iterator[Sanitizer]:
    """Check every launch inside; an access outside every tensor is not made, and its load gives 0 or ``other``.

    Args:
        exact_views: an address has to be an element of a tensor argument, not only of an argument's storage.
        outputs: by kernel, the parameters of which every launch has to write every element.
        allow: what is not a finding here.

    Raises:
        SanitizerError: at the end of the block, with all findings. An exception of the block gets them as notes.
        ValueError: ``outputs`` names a kernel that was not launched, or what is no tensor argument of it.
    """
    sanitizer = Sanitizer(exact_views, outputs or {}, allow)
    try:
        with record(sanitizer):
            yield sanitizer
    except Exception as error:
        for finding in sanitizer.findings:
            error.add_note(str(finding))
        raise
    sanitizer.finish()
    if sanitizer.findings:
        raise SanitizerError(sanitizer.findings)


def sparse_rows(rows: int, columns: int, stride_row: int, dtype: torch.dtype) -> Tensor:
    """Zeros ``[rows, columns]`` with rows ``stride_row`` elements apart, of which only touched pages take memory.

    Where a row's offset is beyond 2^31 elements, a kernel that computes it in int32 accesses what is outside.
    """
    size = (rows - 1) * stride_row + columns
    data = torch.from_numpy(_sparse_zeros(size * dtype.itemsize, np.uint8))
    return data.view(dtype).as_strided((rows, columns), (stride_row, 1))


class Sanitizer(Observer):
    def __init__(self, exact_views: bool, outputs: Mapping[str, Collection[str]], allow: Collection[Hazard]) -> None:
        self._exact_views, self._outputs, self._allow = exact_views, outputs, allow
        self._findings: dict[tuple[Hazard, str, str], Finding] = {}
        self._expected: list[_Expected] = []
        self._launched: set[str] = set()
        self._launch = Launch("", "", (0, 0, 0), ())
        self._shadows: dict[int, _Shadow] = {}
        self._layouts: dict[tuple[tuple[int, ...], int], int] = {}
        # Counts the stretches between barriers over all programs.
        self._epoch = 0

    @property
    def findings(self) -> tuple[Finding, ...]:
        return tuple(self._findings.values())

    def expect_written(self, tensor: Tensor) -> None:
        """Every element of the tensor has to be written by the end of the block."""
        self._expected.append(_Expected(tensor, np.zeros(tensor.shape, dtype=np.bool_)))

    def finish(self) -> None:
        """Look for what was to happen and did not."""
        if missing := self._outputs.keys() - self._launched:
            raise ValueError(f"outputs names kernels that were not launched: {', '.join(sorted(missing))}")
        for expected in self._expected:
            self._report_unwritten(expected.kernel, expected.argument, expected.written)

    def launch_begins(self, launch: Launch) -> None:
        self._launch = launch
        self._launched.add(launch.kernel)
        tensors: dict[int, list[Tensor]] = {}
        for argument in launch.tensors:
            tensors.setdefault(storage_begin(argument.tensor), []).append(argument.tensor)
        self._shadows = {begin: _Shadow(views, self._exact_views) for begin, views in tensors.items()}

    def program_begins(self, program: int) -> None:
        self._epoch += 1

    def barrier(self) -> None:
        self._epoch += 1

    def access(self, access: Access) -> Bools | None:
        addresses = access.addresses.ravel()
        # Two accesses of one shape and item size have a lane in the same thread.
        layout = self._layouts.setdefault((access.addresses.shape, access.item_size), len(self._layouts))
        allowed = ~access.mask.ravel()
        for shadow in self._shadows.values():
            lanes = np.flatnonzero(~allowed)
            lanes = lanes[shadow.holds(addresses[lanes], access.item_size)]
            if lanes.size:
                allowed[lanes] = True
                found = shadow.touch(access, addresses[lanes], lanes + (layout << 32), self._epoch)
                for hazard, others in found.items():
                    self._report_race(hazard, access, addresses[lanes], others.max(axis=1))
        if allowed.all():
            return None
        self._report(Hazard.OUTSIDE, addresses[~allowed], access.program)
        return allowed.reshape(access.mask.shape)

    def launch_ends(self, launch: Launch) -> None:
        for name in self._outputs.get(launch.kernel, ()):
            tensor = next((argument.tensor for argument in launch.tensors if argument.name == name), None)
            if tensor is None:
                raise ValueError(f"outputs names {name}, which is no tensor argument of this launch of {launch.kernel}")
            self._report_unwritten(launch.kernel, name, self._shadows[storage_begin(tensor)].written(tensor))
        for expected in self._expected:
            for argument in launch.tensors:
                if storage_begin(argument.given) == storage_begin(expected.tensor):
                    expected.kernel, expected.argument = launch.kernel, argument.name
                    expected.written |= self._shadows[storage_begin(argument.tensor)].written(expected.tensor)

    def _report_race(self, hazard: Hazard, access: Access, addresses: Ints, others: Programs) -> None:
        where = np.flatnonzero(others)
        if where.size:
            pair = access.program, int(others[where[0]]) - 1
            in_order = hazard is not Hazard.READ_WRITE or access.kind == "load"
            self._report(hazard, addresses[where], *(pair if in_order else pair[::-1]))

    def _report(self, hazard: Hazard, addresses: Ints, *programs: int) -> None:
        argument, element = self._launch.locate(int(addresses[0]))
        ids = tuple(self._launch.program_id(program) for program in dict.fromkeys(programs))
        self._add(Finding(hazard, self._launch.kernel, ids, argument, element, addresses.size))

    def _report_unwritten(self, kernel: str, argument: str, written: Bools) -> None:
        if not written.all():
            missing = np.argwhere(~written)
            self._add(Finding(Hazard.UNWRITTEN, kernel, (), argument, tuple(map(int, missing[0])), len(missing)))

    def _add(self, finding: Finding) -> None:
        if finding.hazard not in self._allow:
            first = self._findings.setdefault((finding.hazard, finding.kernel, finding.argument), finding)
            first.count += 0 if first is finding else finding.count


@dataclass
class _Expected:
    tensor: Tensor
    written: Bools
    kernel: str = "no kernel"
    argument: str = "tensor"


class _Shadow:
    """What the programs of a launch did to one storage, by granules: the size of its tensors' smallest elements."""

    def __init__(self, tensors: Sequence[Tensor], exact_views: bool) -> None:
        self._begin = storage_begin(tensors[0])
        self._end = self._begin + tensors[0].untyped_storage().nbytes()
        self._granule = min(tensor.element_size() for tensor in tensors)
        size = (self._end - self._begin) // self._granule
        self._writers, self._readers, self._atomics = _Owners(size), _Owners(size), _Owners(size)
        # The epoch of the last write and read, and the lane of the read; -1: several lanes in that epoch.
        self._write_epoch, self._read_epoch, self._read_lane = (_sparse_zeros(size, np.int64) for _ in range(3))
        self._exact_views, self._reachable = exact_views, _sparse_zeros(size, np.bool_)
        for tensor in tensors:
            self._view(self._reachable, tensor)[...] = True

    def holds(self, addresses: Ints, item_size: int) -> Bools:
        inside: Bools = (addresses >= self._begin) & (addresses + item_size <= self._end)
        if self._exact_views and inside.any():
            inside[inside] = self._reachable[self._granules(addresses[inside], item_size)].all(axis=1)
        return inside

    def touch(self, access: Access, addresses: Ints, lanes: Ints, epoch: int) -> dict[Hazard, Programs]:
        """Remember an access; returns by hazard the other program of each granule that has it, or its own."""
        at, me = self._granules(addresses, access.item_size), access.program + 1
        lanes = np.broadcast_to(lanes[:, None], at.shape)
        plain, atomic = self._writers.other_than(me, at), self._atomics.other_than(me, at)
        written, read_elsewhere = self._write_epoch[at] == epoch, self._read_epoch[at] == epoch
        read_elsewhere &= self._read_lane[at] != lanes
        if access.kind == "load":
            self._read_epoch[at], self._read_lane[at] = epoch, np.where(read_elsewhere, -1, lanes)
            self._readers.add(me, at)
            return {Hazard.READ_WRITE: np.maximum(plain, atomic), Hazard.READ_OWN_WRITE: me * written}
        found = {Hazard.READ_WRITE: self._readers.other_than(me, at), Hazard.WRITE_WRITE: plain}
        if access.kind == "atomic":
            self._atomics.add(me, at)
            return found
        repeated = np.ones(at.shape, dtype=np.bool_)
        repeated[np.unique(at[:, 0], return_index=True)[1]] = False
        found[Hazard.WRITE_WRITE] = np.maximum(plain, atomic)
        found[Hazard.WRITTEN_TWICE] = me * (repeated | written)
        found[Hazard.OVERWRITTEN_READ] = me * read_elsewhere
        self._write_epoch[at] = epoch
        self._writers.add(me, at)
        return found

    def written(self, tensor: Tensor) -> Bools:
        """Which elements of a view of the storage were written."""
        writers = np.maximum(self._view(self._writers.first, tensor), self._view(self._atomics.first, tensor))
        written: Bools = np.all(writers, axis=-1)
        return written

    def _granules(self, addresses: Ints, item_size: int) -> Ints:
        """Granules ``[lanes, granules of an item]`` of an access."""
        return ((addresses - self._begin) // self._granule)[:, None] + np.arange(self._width(item_size))

    def _width(self, item_size: int) -> int:
        if item_size < self._granule:
            raise NotImplementedError(f"{item_size}-byte items in tensors of {self._granule}-byte elements")
        return item_size // self._granule

    def _view(self, granules: NDArray[Any], tensor: Tensor) -> NDArray[Any]:
        """The granules of a view's elements, ``[*shape, granules of an element]``, in ``granules``' own memory."""
        width = self._width(tensor.element_size())
        strides = [granules.itemsize * step for step in (*(width * stride for stride in tensor.stride()), 1)]
        return as_strided(granules[tensor.storage_offset() * width :], (*tensor.shape, width), strides)


class _Owners:
    """The first program that touched a granule, and the last one that was not the first; 0 is nobody."""

    def __init__(self, size: int) -> None:
        self.first: Programs = _sparse_zeros(size, np.int32)
        self._other: Programs = _sparse_zeros(size, np.int32)

    def other_than(self, me: int, at: Ints) -> Programs:
        first = self.first[at]
        return np.where(first == me, self._other[at], first)

    def add(self, me: int, at: Ints) -> None:
        first = self.first[at]
        self.first[at] = np.where(first == 0, me, first)
        self._other[at[(first != 0) & (first != me)]] = me


def _sparse_zeros(size: int, dtype: DTypeLike) -> NDArray[Any]:
    """Zeros that take memory where they are written, be they larger than the memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    pages = mmap.mmap(-1, max(1, size * np.dtype(dtype).itemsize), flags)
    return np.frombuffer(pages, dtype=dtype, count=size)
