"""Checks that several modules need, and their messages: the argument, what was expected, what came."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Never

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import Parameter, is_lazy

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
BOOL = (torch.bool,)

# What the kernels' arithmetic holds.
_LARGEST, _LARGEST_COUNT = torch.finfo(torch.float32).max, torch.iinfo(torch.int32).max


def refuse_name(name: str, value: None) -> Never:
    """End a dispatch over names: to a type checker only None is left there, a caller learns what is not implemented."""
    raise ValueError(f"{name}={value!r} is not implemented")


def require_number(name: str, value: object, expected: str, holds: Callable[[float], bool]) -> None:
    """Raise TypeError unless ``value`` is an int or a float, ValueError unless it is finite in fp32 and ``holds``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number {expected}, got {value!r}")
    # Not math.isfinite: torch.compile cannot trace it with a number that changes from call to call.
    if not (-math.inf < value < math.inf and holds(value)):
        raise ValueError(f"{name} must be a finite number {expected}, got {_shown(value)}")
    if not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{name} must be a number {expected} that is finite in float32, got {_shown(value)}")


def require_count(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is an int, ValueError unless it is at least 1, and int32 holds it."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int >= 1, got {value!r}")
    if not 1 <= value <= _LARGEST_COUNT:
        bound = ">= 1" if value < 1 else f"<= {_LARGEST_COUNT}"
        raise ValueError(f"{name} must be an int {bound}, got {_shown(value)}")


def _shown(value: float) -> str:
    """A number as it is written. Python refuses to write an int of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an int of {value.bit_length()} bits"
    return repr(value)


def require_tensor(
    name: str, value: object, dtypes: Sequence[torch.dtype], device: torch.device | None = None
) -> Tensor:
    """Raise TypeError unless ``value`` is a tensor of these dtypes, ValueError unless it is plain and on ``device``.

    A plain tensor is whole and dense, and has data.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}{_tensor_within(name, value)}")
    if type(value) not in (Tensor, Parameter):
        _require_plain(name, value)
    _require_whole(name, value)
    if value.layout != torch.strided or value.is_nested:
        layout = "a nested tensor" if value.is_nested else str(value.layout)
        raise ValueError(f"{name} must be a dense tensor, got {layout}")
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        is_number = value.dtype in FLOATING + INTEGER
        hint = f"; {name}.bool() is true where it is not 0" if dtypes == BOOL and is_number else ""
        raise TypeError(f"{name} must be {expected}, got {str(value.dtype).removeprefix('torch.')}{hint}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on the device of the other arguments, {device}, got {value.device}")
    if value.device.type == "meta":
        raise ValueError(f"{name} must be on the device that has its data, got a tensor on meta, without any")
    return value


def _tensor_within(name: str, value: object) -> str:
    """How to make a tensor of what is none, where that can be said."""
    if isinstance(value, list | tuple):
        return f": torch.{'stack' if value and isinstance(value[0], Tensor) else 'tensor'}({name}) makes one"
    if hasattr(value, "__array__"):
        return f": torch.as_tensor({name}) makes one"
    fields = [field for field in ("weight", "last_hidden_state") if isinstance(getattr(value, field, None), Tensor)]
    return f": its {fields[0]} is one" if fields else ""


def _require_plain(name: str, value: Tensor) -> None:
    """Raise ValueError for a subclass that says itself what operations do, or that has no data yet."""
    if is_lazy(value):
        raise ValueError(f"{name} must have data, got an {type(value).__name__} that no forward has initialized")
    # A DTensor has an error of its own; fake tensors are how shapes are found, and others only wait for their data.
    if hasattr(value, "placements") or isinstance(value, FakeTensor) or hasattr(value, "trigger_wait"):
        return
    if type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__ and not value.is_nested:
        raise ValueError(f"{name} must be a plain tensor, got {type(value).__name__}, whose operations are its own")


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


def require_counts(name: str, values: Mapping[str, float]) -> None:
    """Raise ValueError unless these fields of a ``Normalizers`` are finite, and counts not negative."""
    for field, value in values.items():
        if not (math.isfinite(value) and (value >= 0.0 or field == "dw_log_mean")):
            expected = "finite" if field == "dw_log_mean" else "finite and >= 0"
            raise ValueError(f"{name}.{field} must be {expected}, got {value}")
