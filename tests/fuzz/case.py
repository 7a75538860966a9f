"""The choices of a case, and what they make: one call."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from srpo_kernels import SRPOConfig
from tests.fuzz.models import Inputs


class Draw:
    """The choices of one case; ``options`` has them by name."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.options: dict[str, Any] = {}

    def one_of(self, name: str, *values: Any) -> Any:
        """One of the values, each alike; a value that is repeated is likelier."""
        self.options[name] = self.random.choice(values)
        return self.options[name]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def ids(self, most: int, *shape: int) -> Tensor:
        return torch.randint(0, most, shape, generator=self.generator)


@dataclass(frozen=True)
class Case:
    """One call.

    ``exact_products``: every logit is a number of fp32, so that no product is rounded. ``keywords`` are the library's
    alone. ``upstream`` multiplies the loss, or each statistic of each row.
    """

    seed: int
    operation: str
    options: dict[str, Any]
    inputs: Inputs
    config: SRPOConfig
    leaves: tuple[str, ...] = ()
    upstream: Tensor = field(default_factory=lambda: torch.ones(()))
    exact_products: bool = False
    other_batch: tuple[int, float, int, int] | None = None
    keywords: dict[str, Any] | None = None
    lanes: int = 1024

    @property
    def dtype(self) -> torch.dtype:
        """In which results are accumulated."""
        if self.operation == "normalizers":
            return torch.float64
        floating = [x.dtype for x in self.inputs.values() if isinstance(x, Tensor) and x.is_floating_point()]
        return torch.float64 if torch.float64 in floating else torch.float32
