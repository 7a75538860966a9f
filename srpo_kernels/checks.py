"""Checks that several modules need, and their messages: the argument, what was expected, what came."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
BOOL = (torch.bool,)


def require_number(name: str, value: object, expected: str, holds: Callable[[float], bool]) -> None:
    """Raise TypeError unless ``value`` is an int or a float, ValueError unless it is finite and ``holds``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number {expected}, got {value!r}")
    # Not math.isfinite: torch.compile cannot trace it with a number that changes from call to call.
    if not (-math.inf < value < math.inf and holds(value)):
        raise ValueError(f"{name} must be a finite number {expected}, got {value!r}")


def require_tensor(
    name: str, value: object, dtypes: Sequence[torch.dtype], device: torch.device | None = None
) -> Tensor:
    """Raise TypeError unless ``value`` is a tensor of these dtypes, ValueError unless it is on ``device``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {expected}, got {str(value.dtype).removeprefix('torch.')}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on the device of the other arguments, {device}, got {value.device}")
    return value


def require_shape(name: str, value: Tensor, expected: Sequence[Sequence[int]], meaning: str) -> None:
    """Raise ValueError unless ``value`` has one of the ``expected`` shapes, which ``meaning`` explains."""
    if list(value.shape) not in [list(shape) for shape in expected]:
        shapes = " or ".join(dict.fromkeys(str(list(shape)) for shape in expected))
        raise ValueError(f"{name} must have shape {shapes} ({meaning}), got {list(value.shape)}")
