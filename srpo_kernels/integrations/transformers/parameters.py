"""A module with other values for its parameters, for the time of a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from srpo_kernels.integrations.transformers.zero import from_parts, is_partitioned, own_part

# A module, and the name that it has for a parameter.
Place = tuple[nn.Module, str]


@contextmanager
def swapped_parameters(values: list[tuple[Place, Tensor]]) -> Iterator[None]:
    """Modules have these values for their parameters."""
    kept = [(module, name, module._parameters[name]) for (module, name), _ in values]
    try:
        for (module, name), value in values:
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
        yield
    finally:
        for module, name, parameter in kept:
            module._parameters[name] = parameter


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """``module`` outside of its forward, with what FSDP2 or ZeRO-3 has sharded gathered. Every rank makes the call."""
    sharded = [
        ((part, name), _gathered(parameter))
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if isinstance(parameter, DTensor) or is_partitioned(parameter)
    ]
    with swapped_parameters(sharded):
        yield


@torch.no_grad()
def _gathered(parameter: Any) -> Tensor:
    whole: Tensor = (
        from_parts(parameter, own_part(parameter)) if is_partitioned(parameter) else parameter.full_tensor().detach()
    )
    return whole
