"""Parameters that FSDP1 has made slices of a flat parameter, of which a rank has a part."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

# What FSDP1 calls a flat parameter, in the module that it wraps.
FLAT_NAME = "_flat_param"


class FlatPart(NamedTuple):
    """A parameter, by the handle of a flat parameter and its number in that.

    The handle knows it with ``use_orig_params`` and without. The part of a rank is contiguous, and may be empty.
    """

    handle: Any
    number: int

    @property
    def requires_grad(self) -> bool:
        """Whether it is trained: with ``use_orig_params`` a flat parameter may have others."""
        flat = self.handle.flat_param
        trained: bool = (flat if flat._params is None else flat._params[self.number]).requires_grad
        return trained

    @property
    def dtype(self) -> torch.dtype:
        """That of the parts, whatever the dtype of the forward is."""
        return self.own().dtype

    @property
    def shape(self) -> torch.Size:
        """Of the whole."""
        shape: torch.Size = self.handle.flat_param._shapes[self.number]
        return shape

    @property
    def _extent(self) -> Any:
        return self.handle.flat_param._shard_param_infos[self.number]

    def own(self) -> Tensor:
        """``[n]``: this rank's part, a view."""
        flat, extent = self.handle.flat_param, self._extent
        # The first forward sets it.
        shard: Tensor = getattr(flat, "_local_shard", flat.data)
        return shard[extent.offset_in_shard :][: extent.numel_in_shard] if extent.in_shard else shard[:0]

    def whole_of(self, part: Tensor) -> Tensor:
        """The whole of a ``part`` of each rank."""
        flat, extent = self.handle.flat_param, self._extent
        whole = part
        if self.handle.uses_sharded_strategy:
            whole = part.new_zeros(flat._numels[self.number], device=self.handle.device)
            if extent.in_shard:
                whole[extent.intra_param_start_idx : extent.intra_param_end_idx + 1] = part
            dist.all_reduce(whole, group=self.handle.process_group)
        return whole.as_strided(self.shape, flat._strides[self.number])

    def part_of(self, whole: Tensor) -> Tensor:
        """``[n]``: this rank's part of a ``whole``."""
        extent = self._extent
        if not extent.in_shard:
            return whole.new_empty(0)
        # In the order in which the flat parameter has it.
        ordered = whole.new_empty_strided(self.shape, self.handle.flat_param._strides[self.number]).copy_(whole)
        return ordered.as_strided([whole.numel()], [1])[extent.intra_param_start_idx : extent.intra_param_end_idx + 1]


def flat_parts(model: nn.Module) -> dict[nn.Module, dict[str, FlatPart]]:
    """The parameters that FSDP1 has made flat, by the modules that have them and their names there."""
    found: dict[nn.Module, dict[str, FlatPart]] = {}
    for unit in FullyShardedDataParallel.fsdp_modules(model):
        handle: Any = unit._handle
        if handle is None:
            continue
        for number, (name, module, _) in enumerate(handle.flat_param._param_infos):
            found.setdefault(module, {})[name] = FlatPart(handle, number)
        for name, module, _, first_name, first, _ in handle.flat_param._shared_param_infos:
            found.setdefault(module, {})[name] = found[first][first_name]
    return found


def reshard_flat(unit: FullyShardedDataParallel) -> None:
    """Let go of what a unit has gathered: a root keeps it after its forward. Before the first one there is nothing."""
    handle: Any = unit._handle
    if handle is not None and handle.uses_sharded_strategy and hasattr(handle.flat_param, "_local_shard"):
        handle.reshard(True)
