"""What Triton kernels ask of the memory and of the tensor cores, counted in the interpreter on any machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np

from tools.interpreter.launches import Access, Bools, Launch, Observer, record


@dataclass
class Traffic:
    """The sums over the launches of one kernel.

    Bytes are what lanes ask for: a masked-off lane counts nothing, and an address that is asked for twice counts twice,
    whether or not a cache would serve it. An atomic operation counts as a load and a store. FLOPs are those of
    ``tl.dot``, two per multiply-add.
    """

    launches: int = 0
    programs: int = 0
    bytes_loaded: int = 0
    bytes_stored: int = 0
    dot_flops: int = 0


@contextmanager
def measure_traffic() -> Iterator[dict[str, Traffic]]:
    """The traffic of every kernel that is launched inside, by its name with its module: ``package.module.kernel``.

    Raises:
        RuntimeError: kernels are compiled, not interpreted.
    """
    meter = _Meter()
    with record(meter):
        yield meter.traffic


@contextmanager
def trl_kernels_on_cpu() -> Iterator[None]:
    """TRL's chunked functions launch their Triton kernels inside, also for CPU tensors."""
    with (
        patch("trl.kernels.chunked_logprob._use_triton", return_value=True),
        patch("trl.kernels.chunked_divergence._use_triton", return_value=True),
    ):
        yield


class _Meter(Observer):
    def __init__(self) -> None:
        self.traffic: dict[str, Traffic] = {}
        self._current = Traffic()

    def launch_begins(self, launch: Launch) -> None:
        self._current = self.traffic.setdefault(f"{launch.module}.{launch.kernel}", Traffic())
        self._current.launches += 1
        self._current.programs += launch.programs

    def access(self, access: Access) -> Bools | None:
        size = int(np.count_nonzero(access.mask)) * access.item_size
        if access.kind != "store":
            self._current.bytes_loaded += size
        if access.kind != "load":
            self._current.bytes_stored += size
        return None

    def dot(self, m: int, n: int, k: int) -> None:
        self._current.dot_flops += 2 * m * n * k
