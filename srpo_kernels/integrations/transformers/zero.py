"""Parameters that DeepSpeed's ZeRO-3 has partitioned.

A rank has a flat part of each; the hooks of a module make its parameters whole for its forward and its backward.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_partitioned(parameter: Any) -> bool:
    """Whether ZeRO-3 has this parameter."""
    return hasattr(parameter, "ds_tensor")


def whole_shape(parameter: Any) -> torch.Size:
    """The shape of a parameter, of which there may be a part here."""
    shape: torch.Size = parameter.ds_shape if is_partitioned(parameter) else parameter.shape
    return shape


def own_part(parameter: Any) -> Tensor:
    """What this rank has of it, which is what is gathered and what the optimizer updates: flat, with padding."""
    part: Tensor = parameter.ds_tensor.data
    return part


def from_parts(parameter: Any, part: Tensor) -> Tensor:
    """The whole of ``part``, which every rank has one of, as of the parameter."""
    group = parameter.ds_process_group
    flat = part.new_empty(dist.get_world_size(group) * part.numel())
    dist.all_gather_into_tensor(flat, part.contiguous(), group=group)
    return flat[: parameter.ds_numel].view(parameter.ds_shape)


def to_part(parameter: Any, whole: Tensor) -> Tensor:
    """This rank's part of a ``whole`` that every rank has."""
    part = torch.zeros_like(own_part(parameter), dtype=whole.dtype)
    start = dist.get_rank(parameter.ds_process_group) * part.numel()
    mine = whole.flatten()[start : start + part.numel()]
    part[: mine.numel()] = mine
    return part


def release(parameters: Iterable[Any]) -> None:
    """Let go of what is whole, so that the next forward gathers the parts as they are now."""
    for parameter in parameters:
        if is_partitioned(parameter) and parameter.ds_status.name == "AVAILABLE":
            parameter.partition()
