"""Reductions across processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def gather_ranks(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """``values`` of every rank in rank order, ``[world_size, *values.shape]``: the same tensor on all ranks.

    One ``all_gather``. ``group=None`` is the default group; without one this process is the only rank.
    """
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return values.unsqueeze(0)
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, values, group=group)
    return torch.stack(gathered)
