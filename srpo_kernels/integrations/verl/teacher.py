"""The self-teacher: a moving average of the shards that a rank of FSDP holds, and what it says of routed responses."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from srpo_kernels.integrations.transformers.shards import release


class ShardAverage:
    """``average += rate * (parameter - average)`` of this rank's shard of each trained parameter.

    In fp32 or wider, beside the shards: no second model. ``applied`` exchanges the two in place, so that forwards are
    the teacher's. verl keeps checkpoints in shards, for which `AverageTeacher` would gather them, and moves averages to
    the host and back. FSDP1's flat parameters are shards like any others.

    Args:
        module: sharded by FSDP1 or FSDP2, or neither; LoRA pays for its adapters alone.
        rate: in [0, 1]; 0 is a frozen teacher, the model as it is now.

    Raises:
        ValueError: a module without a trained parameter.
    """

    def __init__(self, module: nn.Module, rate: float) -> None:
        self._module, self.rate = module, rate
        self.averages = {
            name: shard.to(torch.promote_types(shard.dtype, torch.float32), copy=True)
            for name, shard in self._shards().items()
        }
        if not self.averages:
            raise ValueError("module must have a parameter that is trained, for an average of it, got none")

    def _shards(self) -> dict[str, Tensor]:
        # Anew each time: FSDP1 and offloading give parameters other tensors.
        return {
            name: parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
            for name, parameter in self._module.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model: after an optimizer step that was taken."""
        if self.rate == 0.0:
            return
        for name, shard in self._shards().items():
            average = self.averages[name]
            average.lerp_(shard.detach().to(average), self.rate)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module has the averages for its parameters, rounded to their dtype. Every rank makes the call."""
        kept: dict[str, Tensor] = {}
        self._exchange(kept)
        try:
            yield
        finally:
            self._exchange(kept)

    @torch.no_grad()
    def _exchange(self, kept: dict[str, Tensor]) -> None:
        """Swap shards and averages. An average that a shard would round stays, and the shard is ``kept`` meanwhile."""
        release(self._module)
        for name, shard in self._shards().items():
            average = self.averages[name]
            if name in kept:
                shard.copy_(kept.pop(name))
                continue
            own = shard.clone()
            shard.copy_(average)
            if average.dtype == own.dtype:
                average.copy_(own)
            else:
                kept[name] = own

    def to(self, device: str | torch.device) -> None:
        """Move the averages, as verl moves the parameters that it offloads."""
        for name, average in self.averages.items():
            self.averages[name] = average.to(device)

    def save(self, folder: str, rank: int, world_size: int) -> None:
        """Write this rank's averages into a checkpoint of verl's."""
        torch.save({name: average.cpu() for name, average in self.averages.items()}, _path(folder, rank, world_size))

    def load(self, folder: str, rank: int, world_size: int) -> None:
        """Read them again. Raises ValueError where there are none, or those of other shards."""
        path = _path(folder, rank, world_size)
        if not os.path.exists(path):
            raise ValueError(
                f"the checkpoint must be of a run with a teacher on as many ranks, to go on with one: {path} does not "
                "exist; srpo.teacher_model_kind=live needs none"
            )
        saved: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        shapes = [{name: list(x.shape) for name, x in values.items()} for values in (saved, self.averages)]
        if shapes[0] != shapes[1]:
            different = sorted(name for name, shape in shapes[1].items() if shapes[0].get(name) != shape)
            raise ValueError(f"{path} must hold the averages of this run's shards, it has others for {different[:3]}")
        for name, average in self.averages.items():
            average.copy_(saved[name])


def _path(folder: str, rank: int, world_size: int) -> str:
    return os.path.join(folder, f"srpo_teacher_world_size_{world_size}_rank_{rank}.pt")
