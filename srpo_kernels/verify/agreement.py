"""Whether providers compute the same thing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from srpo_kernels.verify.batches import Batch
from srpo_kernels.verify.kinds import OURS, DtypeName, ProviderName
from srpo_kernels.verify.providers import REGISTRY, Result, Step, Unsupported, prepare

# Providers that differ more than rounding explains do not compute the same thing. In bf16 some round the logits.
TOLERANCES: dict[DtypeName, float] = {"float32": 1e-3, "bfloat16": 0.5}


class Errors(NamedTuple):
    """Relative differences in the Euclidean norm."""

    loss: float
    grad_hidden: float
    grad_weight: float


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Of ``actual`` from ``expected``, in the Euclidean norm."""
    return float((actual.to(expected) - expected).norm() / expected.norm())


def compare(steps: Mapping[ProviderName, Step], batch: Batch, tolerance: float) -> dict[ProviderName, Errors]:
    """Run every step once, which also warms it up, and compare loss, dX and dW with the naive loss's.

    RuntimeError where they differ by more than ``tolerance``.
    """
    truth = Truth(steps, batch)
    errors: dict[ProviderName, Errors] = {}
    for name, step in steps.items():
        result = step()
        if name != "bare":
            errors[name] = truth.errors(name, result, tolerance)
    return errors


class Truth:
    """Results of the naive loss on a batch; where it cannot run, of this library.

    A provider without weights for distilled tokens is compared with the loss without them.
    """

    def __init__(self, steps: Mapping[ProviderName, Step], batch: Batch) -> None:
        self._distills = batch.distills
        self._results = {True: _expected(steps, batch)}
        if batch.distills and any(not REGISTRY[name].weighted for name in steps):
            self._results[False] = _expected({}, batch.unweighted())

    def errors(self, provider: ProviderName, result: Result, tolerance: float) -> Errors:
        """Of a provider's result; RuntimeError where one is not below ``tolerance``."""
        truth = self._results[REGISTRY[provider].weighted or not self._distills]
        errors = Errors(*map(relative_error, result[:3], truth[:3]))
        if not all(error < tolerance for error in errors):
            raise RuntimeError(f"{provider} does not compute the same loss and gradients: {errors}")
        return errors


def _expected(steps: Mapping[ProviderName, Step], batch: Batch) -> Result:
    try:
        return steps["naive"]() if "naive" in steps else prepare("naive", batch)()
    except (Unsupported, torch.OutOfMemoryError):
        return prepare(OURS[0], batch)()
