"""Times of steps that take turns, and quantiles of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch

Name = TypeVar("Name", bound=str)

# Milliseconds that a GPU spends on one provider in one round.
_GPU_WARM_UP, _GPU_TIME = 5, 50


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
    done, start = 0, time.perf_counter()
    while rounds.go_on(done, time.perf_counter() - start):
        first = done % len(names)
        done += 1
        for name in names[first:] + names[:first]:
            progress(f"round {done}, {name}")
            seconds[name].append(_gpu_seconds(steps[name]) if device.type == "cuda" else _wall_seconds(steps[name]))
    return seconds


def _wall_seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = step()
    seconds = time.perf_counter() - start
    # Gradients are given back outside the timed part.
    del result
    return seconds


def _gpu_seconds(step: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(step, warmup=_GPU_WARM_UP, rep=_GPU_TIME, return_mode="median")) / 1e3
