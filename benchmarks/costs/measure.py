"""One step's costs per row and per element of the vocabulary, from the counts of four small batches."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import product
from typing import NamedTuple, TypeAlias
from unittest.mock import patch

from torch import Tensor
from triton.runtime.interpreter import GridExecutor

from benchmarks.costs import CaseName, ProviderName
from benchmarks.costs.steps import HIDDEN_SIZE, prepare
from srpo_kernels.engine import workspace
from srpo_kernels.verify.timing import MemoryMeter
from tools.interpreter.traffic import Traffic, measure_traffic
from tools.meters import OperatorMeter, ProductMeter

_ROWS = (4, 6)
# One and three of the kernels' largest blocks and a ragged tail, which the engine pads by the same number of elements.
_VOCAB_SIZES = (4_096 + 1_003, 3 * 4_096 + 1_003)


@dataclass(frozen=True)
class PerRow:
    """``per_element * V + constant`` for each row of logits."""

    per_element: float = 0.0
    constant: float = 0.0

    def __add__(self, other: PerRow) -> PerRow:
        return PerRow(self.per_element + other.per_element, self.constant + other.constant)


@dataclass(frozen=True)
class KernelCost:
    """A kernel's part of a step: launches in a chunk, bytes, and dots in units of ``2 * N * H * V`` FLOP."""

    launches: int
    loaded: PerRow
    stored: PerRow
    dots: float


@dataclass(frozen=True)
class StepCost:
    """A step: products in units of ``N * H * V``; bytes per logit that torch's operators move, and that are alive."""

    products: float
    operators: float
    workspace: float
    kernels: dict[str, KernelCost]

    @property
    def loaded(self) -> PerRow:
        return sum((kernel.loaded for kernel in self.kernels.values()), PerRow())

    @property
    def stored(self) -> PerRow:
        return sum((kernel.stored for kernel in self.kernels.values()), PerRow())

    @property
    def launches(self) -> int:
        return sum(kernel.launches for kernel in self.kernels.values())

    @property
    def dots(self) -> float:
        return sum(kernel.dots for kernel in self.kernels.values())


# Rows and vocabulary of a batch.
_Size: TypeAlias = tuple[int, int]


class _Counts(NamedTuple):
    multiply_adds: int
    operator_bytes: int
    kernels: dict[str, Traffic]


def measure(provider: ProviderName, case: CaseName) -> StepCost:
    """Run the provider's step on every batch and take the differences.

    Raises:
        ImportError: the provider is not installed.
    """
    counts = {size: _count(provider, case, *size) for size in product(_ROWS, _VOCAB_SIZES)}
    peaks = {size: _peak_bytes(provider, case, *size) for size in product(_ROWS, _VOCAB_SIZES)}
    names = next(iter(counts.values())).kernels
    return StepCost(
        products=_fit({size: count.multiply_adds for size, count in counts.items()}).per_element / HIDDEN_SIZE,
        operators=_fit({size: count.operator_bytes for size, count in counts.items()}).per_element,
        workspace=_fit(peaks).per_element,
        kernels={name: _kernel_cost({size: count.kernels[name] for size, count in counts.items()}) for name in names},
    )


def _kernel_cost(traffic: dict[_Size, Traffic]) -> KernelCost:
    flops = _fit({size: part.dot_flops for size, part in traffic.items()})
    return KernelCost(
        next(iter(traffic.values())).launches,
        loaded=_fit({size: part.bytes_loaded for size, part in traffic.items()}),
        stored=_fit({size: part.bytes_stored for size, part in traffic.items()}),
        dots=flops.per_element / (2 * HIDDEN_SIZE),
    )


def _fit(values: dict[_Size, int]) -> PerRow:
    """What a row costs, from what batches of two numbers of rows cost at two vocabularies.

    Costs of a call and of the weight are the same for few and for many rows, so they drop out.
    """
    (few, small), (many, large) = min(values), max(values)
    at_small = (values[many, small] - values[few, small]) / (many - few)
    at_large = (values[many, large] - values[few, large]) / (many - few)
    per_element = (at_large - at_small) / (large - small)
    return PerRow(per_element, at_small - per_element * small)


def _count(provider: ProviderName, case: CaseName, rows: int, vocab_size: int) -> _Counts:
    with (
        prepare(provider, case, rows, vocab_size) as (step, _),
        OperatorMeter() as operators,
        ProductMeter() as products,
        measure_traffic() as traffic,
    ):
        step()
    return _Counts(products.multiply_adds, operators.bytes_moved, traffic)


def _peak_bytes(provider: ProviderName, case: CaseName, rows: int, vocab_size: int) -> int:
    """In a run of its own, where kernels do nothing: the interpreter would hold on to what they were given."""
    # The engine's buffer belongs to the peak, and this thread may have one already.
    workspace.release()
    with prepare(provider, case, rows, vocab_size) as (step, batch):
        inputs = [x for field in fields(batch) if isinstance(x := getattr(batch, field.name), Tensor)]
        memory = MemoryMeter(*inputs)
        with memory, patch.object(GridExecutor, "__call__", lambda *args, **options: None):
            step()
    return memory.peak
