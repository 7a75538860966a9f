"""Whether providers compute the same thing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from benchmarks.cases import Batch, DtypeName
from benchmarks.providers import OURS, REGISTRY, ProviderName, Result, Step, Unsupported, prepare

# Providers that differ more than rounding explains do not compute the same thing. In bf16 some round the logits.
TOLERANCES: dict[DtypeName, float] = {"float32": 1e-3, "bfloat16": 0.5}


class Errors(NamedTuple):
    """Relative differences in the Euclidean norm."""

    loss: float
    grad_hidden: float
    grad_weight: float


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.to(expected) - expected).norm() / expected.norm())


def compare(steps: Mapping[ProviderName, Step], batch: Batch, tolerance: float) -> dict[ProviderName, Errors]:
    """Run every step once, which also warms it up, and compare loss, dX and dW with the naive loss's.

    A provider without weights for distilled tokens is compared with the naive loss without them. Where the naive loss
    cannot run, this library takes its place. RuntimeError where they differ by more than ``tolerance``.
    """
    expected = {True: _expected(steps, batch)}
    if any(not REGISTRY[name].weighted for name in steps) and batch.distills:
        expected[False] = _expected({}, batch.unweighted())
    errors: dict[ProviderName, Errors] = {}
    for name, step in steps.items():
        result = step()
        if name == "bare":
            continue
        truth = expected[REGISTRY[name].weighted or not batch.distills]
        errors[name] = Errors(*map(relative_error, result[:3], truth[:3]))
        if not all(error < tolerance for error in errors[name]):
            raise RuntimeError(f"{name} does not compute the same loss and gradients: {errors[name]}")
    return errors


def _expected(steps: Mapping[ProviderName, Step], batch: Batch) -> Result:
    try:
        return steps["naive"]() if "naive" in steps else prepare("naive", batch)()
    except Unsupported:
        return prepare(OURS[0], batch)()
