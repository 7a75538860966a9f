"""Parameters of which a rank has a part: those of FSDP1 and 2, of DeepSpeed's ZeRO-3 and of tensor parallelism.

FSDP1's are slices of one flat parameter per unit, and tensors of modules within its forward. FSDP2's are DTensors
outside of the forward, those of tensor parallelism are in it, too. ZeRO-3 has a flat part of each parameter on each
rank, and makes a module's own parameters whole between the hooks of its forward and of its backward. The part of any
other parameter is the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from srpo_kernels.integrations.transformers.flat import FLAT_NAME, FlatPart, flat_parts, reshard_flat

# A module, and the name that it has for a parameter.
Place = tuple[nn.Module, str]
UNITS = (FSDPModule, FullyShardedDataParallel)
# What wrappers put before the names of what they wrap.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def is_partitioned(parameter: Any) -> bool:
    """Whether ZeRO-3 has the parameter."""
    return hasattr(parameter, "ds_tensor")


def is_tensor_parallel(parameter: Any) -> TypeGuard[DTensor]:
    """Whether a parameter, as it is in the forward, is tensor parallelism's: its ranks read the same rows.

    transformers names its mesh. What FSDP2 leaves in shards, outside of its forward, is over another one.
    """
    return isinstance(parameter, DTensor) and parameter.device_mesh.mesh_dim_names == ("tp",)


def tensor_parallel_group(model: nn.Module) -> ProcessGroup | None:
    """The ranks of which each has shards of one model of tensor parallelism; None for a model that is in none."""
    for parameter in model.parameters():
        if isinstance(parameter, DTensor) and "tp" in (parameter.device_mesh.mesh_dim_names or ()):
            return parameter.device_mesh.get_group("tp")
    return None


def is_part(parameter: Any) -> bool:
    """Whether a rank has a part of the parameter, not the whole."""
    return isinstance(parameter, DTensor | FlatPart) or is_partitioned(parameter)


def has_parts(module: nn.Module) -> bool:
    """Whether every rank has to make the calls of a module."""
    return any(isinstance(unit, UNITS) for unit in module.modules()) or any(map(is_part, module.parameters()))


def parameters_of(model: nn.Module) -> Iterator[tuple[str, Place, Any]]:
    """Every place of a parameter: its name in the model without wrappers, the place, and the parameter.

    Of a parameter that FSDP1 has made flat, that is a `FlatPart`.
    """
    flat = flat_parts(model)
    for prefix, module in model.named_modules():
        own = {name: x for name, x in module._parameters.items() if x is not None and name != FLAT_NAME}
        for name, parameter in (own | flat.get(module, {})).items():
            whole_name = f"{prefix}.{name}" if prefix else name
            for wrapper in WRAPPERS:
                whole_name = whole_name.replace(wrapper, "")
            yield whole_name, (module, name), parameter


def whole_shape(parameter: Any) -> torch.Size:
    """The shape of the whole parameter."""
    shape: torch.Size = parameter.ds_shape if is_partitioned(parameter) else parameter.shape
    return shape


@torch.no_grad()
def own_part(parameter: Any) -> Tensor:
    """What this rank has of it, detached and in place: what an optimizer updates, and what is gathered."""
    if isinstance(parameter, FlatPart):
        return parameter.own()
    part: Tensor = parameter.detach()
    if is_partitioned(parameter):
        part = parameter.ds_tensor.data
    elif isinstance(parameter, DTensor):
        part = parameter.to_local()
    return part


@torch.no_grad()
def from_parts(parameter: Any, part: Tensor, like: Tensor | None = None) -> Tensor:
    """The whole of ``part``, of which every rank has one as of the parameter. Every rank makes the call.

    Where ``like`` is tensor parallelism's and the parameter is in the same shards, they stay: it is a DTensor, too.
    """
    if isinstance(parameter, FlatPart):
        return parameter.whole_of(part)
    if is_partitioned(parameter):
        group = parameter.ds_process_group
        flat = part.new_empty(dist.get_world_size(group) * part.numel())
        dist.all_gather_into_tensor(flat, part.contiguous(), group=group)
        return flat[: parameter.ds_numel].view(parameter.ds_shape)
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        shards = DTensor.from_local(part, mesh, placements, shape=parameter.shape, stride=parameter.stride())
        names = mesh.mesh_dim_names or ()
        if is_tensor_parallel(like) and "tp" in names and mesh["tp"] == like.device_mesh:
            own = names.index("tp")
            if placements[own] == like.placements[0]:
                kept = [place if dim == own else Replicate() for dim, place in enumerate(placements)]
                return shards.redistribute(placements=kept)
        return shards.full_tensor()
    return part


@torch.no_grad()
def to_part(parameter: Any, whole: Tensor) -> Tensor:
    """This rank's part of a ``whole`` that every rank has."""
    if isinstance(parameter, FlatPart):
        return parameter.part_of(whole)
    if is_partitioned(parameter):
        part = torch.zeros_like(own_part(parameter), dtype=whole.dtype)
        start = dist.get_rank(parameter.ds_process_group) * part.numel()
        mine = whole.flatten()[start : start + part.numel()]
        part[: mine.numel()] = mine
        return part
    if isinstance(parameter, DTensor):
        # Every rank has the whole tensor: nothing is sent.
        shards = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        return shards.to_local()
    return whole


def release(module: nn.Module) -> None:
    """Let go of what is gathered, so that the next forward gathers the parts as they are then."""
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()
        elif isinstance(unit, FullyShardedDataParallel):
            reshard_flat(unit)
    parameter: Any
    for parameter in module.parameters():
        if is_partitioned(parameter) and parameter.ds_status.name == "AVAILABLE":
            parameter.partition()


@contextmanager
def swapped_parameters(values: list[tuple[Place, Tensor]]) -> Iterator[None]:
    """Modules have these values for their parameters."""
    kept: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for (module, name), value in values:
            # An attribute, which FSDP1 sets, comes before a parameter.
            held: dict[str, Any] = vars(module) if name in vars(module) else module._parameters
            # ZeRO-3 gathers what is read by its name.
            kept.append((held, name, held.get(name)))
            held[name] = value if held is vars(module) else nn.Parameter(value, requires_grad=False)
        yield
    finally:
        for held, name, parameter in reversed(kept):
            held[name] = parameter


@contextmanager
def whole_parameters(model: nn.Module, modules: Iterable[nn.Module], like: Tensor | None = None) -> Iterator[None]:
    """``modules`` of ``model``, outside of their forwards, with whole parameters of their own; see ``from_parts``.

    Every rank makes the call.
    """
    within = set(modules)
    parts = [
        (place, from_parts(parameter, own_part(parameter), like))
        for _, place, parameter in parameters_of(model)
        if place[0] in within and is_part(parameter)
    ]
    with swapped_parameters(parts):
        yield
