"""A second device without one: tensors that live on the CPU, say that they do not, and refuse those that do.

The device is ``lazy``, which autograd runs in the CPU's own thread. Within ``here_and_there()`` a tensor goes there by
``.to(FAR)`` and comes back by ``.cpu()``; an operation on tensors of both devices raises, but for a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NEAR, FAR = torch.device("cpu"), torch.device("lazy", 0)
_MOVES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class FarTensor(Tensor):
    """What is on the device: ``near`` holds its numbers."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> FarTensor:
        made: FarTensor = Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=FAR,
        )
        made.near = near
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Far()(func, args, kwargs or {})


class Far(TorchDispatchMode):
    """In its context the device is there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self(func, args, kwargs or {})

    def __call__(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        far = [x for x in given if isinstance(x, FarTensor)]
        # A number of the CPU may be an operand anywhere.
        if far and func not in _MOVES and any(x.ndim for x in given if not isinstance(x, FarTensor)):
            raise RuntimeError(f"{func} has tensors on two devices")
        is_far = bool(far) if func is not torch.ops.aten.copy_.default else isinstance(args[0], FarTensor)
        if kwargs.get("device") is not None:
            is_far = torch.device(kwargs["device"]).type == FAR.type
            kwargs = kwargs | {"device": NEAR}
        near_args, near_kwargs = tree_map(lambda x: x.near if isinstance(x, FarTensor) else x, (args, kwargs))
        known = {id(x.near): x for x in far}

        def placed(x: Any) -> Any:
            if not isinstance(x, Tensor) or not is_far:
                return x
            return known[id(x)] if id(x) in known else FarTensor(x)

        return tree_map(placed, func(*near_args, **near_kwargs))


@contextmanager
def here_and_there() -> Iterator[None]:
    """The device is there, without an autocast."""
    is_enabled = torch.is_autocast_enabled
    with pytest.MonkeyPatch.context() as patch, Far():
        patch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": kind != FAR.type and is_enabled(kind))
        yield


def split(model: Any, first: torch.device, last: torch.device, head: torch.device) -> Any:
    """``model`` with its parts on devices, and accelerate's hooks that bring them their inputs."""
    backbone = model.model
    # Its cache begins with `torch.tensor`, which no dispatch sees.
    model.config.use_cache = False
    half = len(backbone.layers) // 2
    places = dict.fromkeys((backbone.embed_tokens, backbone.rotary_emb, *backbone.layers[:half]), first)
    places |= dict.fromkeys((*backbone.layers[half:], backbone.norm), last) | {model.lm_head: head}
    for module, device in places.items():
        add_hook_to_module(module.to(device), AlignDevicesHook(device))
    add_hook_to_module(model, AlignDevicesHook(io_same_device=True))
    model.hf_device_map = {"model.embed_tokens": str(first), "model.norm": str(last), "lm_head": str(head)}
    return model
