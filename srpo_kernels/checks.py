"""Checks that several modules need, and their messages: the argument, what was expected, what came."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Never

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
BOOL = (torch.bool,)


def refuse_name(name: str, value: None) -> Never:
    """End a dispatch over names: to a type checker only None is left there, a caller learns what is not implemented."""
    raise ValueError(f"{name}={value!r} is not implemented")


def require_number(name: str, value: object, expected: str, holds: Callable[[float], bool]) -> None:
    """Raise TypeError unless ``value`` is an int or a float, ValueError unless it is finite and ``holds``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number {expected}, got {value!r}")
    # Not math.isfinite: torch.compile cannot trace it with a number that changes from call to call.
    if not (-math.inf < value < math.inf and holds(value)):
        raise ValueError(f"{name} must be a finite number {expected}, got {value!r}")


def require_count(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is an int, ValueError unless it is at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int >= 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be an int >= 1, got {value!r}")


def require_tensor(
    name: str, value: object, dtypes: Sequence[torch.dtype], device: torch.device | None = None
) -> Tensor:
    """Raise TypeError unless ``value`` is a tensor of these dtypes, ValueError unless it is whole and on ``device``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    _require_whole(name, value)
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {expected}, got {str(value.dtype).removeprefix('torch.')}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on the device of the other arguments, {device}, got {value.device}")
    return value


def _require_whole(name: str, value: Tensor) -> None:
    """Raise ValueError for one rank's part of a tensor that FSDP2, tensor parallelism or ZeRO-3 distributes."""
    # Told by their attributes: importing DTensor costs seconds, and DeepSpeed may not be there.
    if hasattr(value, "placements"):
        raise ValueError(
            f"{name} must be a whole tensor, got a DTensor with placements {value.placements}: parameters that FSDP2 "
            "shards are whole within the forward of the module that owns them (call_as_forward runs a loss as one); "
            "a head that is sharded over the vocabulary goes in as to_local() with its vocab_parallel_group; any "
            "other DTensor needs full_tensor()"
        )
    if hasattr(value, "ds_shape") and value.shape != value.ds_shape:
        raise ValueError(
            f"{name} must be a whole tensor, got a parameter that ZeRO-3 has partitioned, {list(value.shape)} of "
            f"{list(value.ds_shape)}: it is whole within the forward of the module that owns it (call_as_forward "
            "runs a loss as one)"
        )


def require_shape(name: str, value: Tensor, expected: Sequence[Sequence[int]], meaning: str) -> None:
    """Raise ValueError unless ``value`` has one of the ``expected`` shapes, which ``meaning`` explains."""
    if list(value.shape) not in [list(shape) for shape in expected]:
        shapes = " or ".join(dict.fromkeys(str(list(shape)) for shape in expected))
        raise ValueError(f"{name} must have shape {shapes} ({meaning}), got {list(value.shape)}")
