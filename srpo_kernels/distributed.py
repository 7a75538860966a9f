"""Reductions across processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d


def gather_ranks(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """``values`` of every rank in rank order, ``[world_size, *values.shape]``: the same tensor on all ranks.

    One ``all_gather``. ``group=None`` is the default group; without one this process is the only rank.
    """
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return values.unsqueeze(0)
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, values, group=group)
    return torch.stack(gathered)


def require_group(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a process group that this process belongs to."""
    if not isinstance(value, dist.ProcessGroup):
        raise TypeError(
            f"{name} must be a torch.distributed.ProcessGroup that this process is in, or None, "
            f"got {type(value).__name__}"
        )


def gather_numbers(numbers: list[int], group: dist.ProcessGroup, like: object) -> list[list[int]]:
    """The integers of every rank in rank order: one ``gather_ranks``, on the host where the group can.

    Elsewhere on the accelerator that has ``like``, a tensor of the call: the current one may be another rank's.
    """
    device: torch.device | None = torch.device("cpu")
    if "cpu:" not in dist.get_backend_config(group):
        device = torch.accelerator.current_accelerator(check_available=True)
        if isinstance(like, Tensor) and device is not None and like.device.type == device.type:
            device = like.device
    rows: list[list[int]] = gather_ranks(torch.tensor(numbers, device=device), group).tolist()
    return rows


def gather_rows(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The ``values`` ``[n]`` of all ranks one after the other, of which each may have another number: two gathers."""
    counts = [count for (count,) in gather_numbers([len(values)], group, values)]
    padded = values.new_zeros(max(counts))
    padded[: len(values)] = values
    return torch.cat([row[:count] for row, count in zip(gather_ranks(padded, group), counts, strict=True)])


def max_ranks(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The largest values of all ranks of a group, None for this one alone; without gradient."""
    return values if group is None else gather_ranks(values, group).amax(0)


class _SumRanks(torch.autograd.Function):
    """A sum over ranks is the adjoint of itself."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gather_ranks(values, group).sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gather_ranks(grad.contiguous(), ctx.group).sum(0), None


def sum_ranks(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over all ranks, the same to the last bit on each; ``values`` as they are without a group.

    One gather, and one in the backward: every rank's loss may depend on every rank's values.
    """
    if group is None:
        return values
    summed: Tensor = _SumRanks.apply(values, group)
    return summed


def sum_ranks_(values: Tensor, group: dist.ProcessGroup) -> None:
    """Put the sum over all ranks in the place of ``values``: one ``all_reduce``."""
    dist.all_reduce(values, group=group)


def group_of(name: str) -> dist.ProcessGroup:
    """The process group of a name, which is all that an operator of a compiled graph can be told of one."""
    return distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]
