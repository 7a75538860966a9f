"""Times of steps that take turns, and quantiles of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Name = TypeVar("Name", bound=str)

# Of an accelerator whose cache is not known: more than any has.
_CACHE_BYTES = 256 << 20


class Quantiles(NamedTuple):
    """The 20th percentile, the median and the 80th percentile over rounds."""

    p20: float
    median: float
    p80: float


class Rounds(NamedTuple):
    """How often every provider runs: ``most`` times, fewer once ``budget`` seconds are over, but ``fewest`` times."""

    most: int
    budget: float
    fewest: int = 3

    def go_on(self, done: int, seconds: float) -> bool:
        """Whether another round begins."""
        return done < self.most and (done < self.fewest or seconds < self.budget)


def quantiles(values: Sequence[float]) -> Quantiles:
    """Of the seconds or ratios of all rounds."""
    points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return Quantiles(*torch.tensor(values, dtype=torch.float64).quantile(points).tolist())


def interleave(
    steps: Mapping[Name, Callable[[], object]], rounds: Rounds, device: torch.device, progress: Callable[[str], None]
) -> dict[Name, list[float]]:
    """Seconds of each step in each round. Every round runs all of them and starts with another one.

    A machine that slows down for a while slows all of them down, so ratios within a round hold.
    """
    names = list(steps)
    seconds: dict[Name, list[float]] = {name: [] for name in names}
    clock = Clock(device)
    done, start = 0, time.perf_counter()
    while names and rounds.go_on(done, time.perf_counter() - start):
        first = done % len(names)
        done += 1
        for name in names[first:] + names[:first]:
            progress(f"round {done}, {name}")
            seconds[name].append(clock.seconds(steps[name]))
    return seconds


class Clock:
    """Times steps: by events of an accelerator, whose cache holds nothing of theirs when they begin, or of a CPU.

    A step that waits for its host is timed with the wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cache: Tensor | None = None
        if device.type != "cpu":
            self._cache = torch.empty(2 * cache_bytes(device), dtype=torch.int8, device=device)

    def seconds(self, step: Callable[[], object]) -> float:
        """Of one run; what it returns is freed outside the timed part."""
        if self._cache is None:
            start = time.perf_counter()
            result = step()
            seconds = time.perf_counter() - start
        else:
            self._cache.zero_()
            events = [torch.Event(self._device, enable_timing=True) for _ in range(2)]
            events[0].record()
            result = step()
            events[1].record()
            torch.accelerator.synchronize(self._device)
            seconds = events[0].elapsed_time(events[1]) / 1e3
        del result
        return seconds


def cache_bytes(device: torch.device) -> int:
    """The accelerator's last cache, as far as torch knows it."""
    module = torch.get_device_module(device)
    found = module.get_device_properties(device) if hasattr(module, "get_device_properties") else None
    return int(getattr(found, "L2_cache_size", 0)) or _CACHE_BYTES
