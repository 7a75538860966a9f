"""Wrong forms of an argument, each with the error that it is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import srpo_kernels as sk


class Bad(NamedTuple):
    """A wrong form of an argument, the error that it is, and what the message says of it."""

    value: Any
    error: type[Exception]
    message: str


def bad_tensors(x: Tensor) -> dict[str, Bad]:
    """By the name of the form."""
    # Some of torch's forms are beta or on their way out.
    with warnings.catch_warnings(action="ignore"):
        return dict(_bad_tensors(x))


def _bad_tensors(x: Tensor) -> Iterator[tuple[str, Bad]]:
    is_mask = x.dtype == torch.bool
    for kind in (list, tuple):
        yield kind.__name__, Bad(kind([1.0]), TypeError, rf"got {kind.__name__}: torch\.tensor\(\w+\) makes one")
    yield "array", Bad(x.numpy(), TypeError, r"got ndarray: torch\.as_tensor\(\w+\) makes one")
    yield "module", Bad(nn.Linear(2, 2), TypeError, "got Linear: its weight is one")
    for value in (1.0, "tensor", {"a": x}, object()):
        yield type(value).__name__, Bad(value, TypeError, f"got {type(value).__name__}")
    if x.ndim:
        yield "tensors", Bad(list(x), TypeError, r"got list: torch\.stack\(\w+\) makes one")
        yield "one more dimension", Bad(x[..., None, None], ValueError, r"\[.*, 1, 1\]")
        yield "sparse", Bad(x.to_sparse(), ValueError, r"must be a dense tensor, got torch\.sparse_coo")
        yield "on another device", Bad(x.to("meta"), ValueError, "meta")
    if x.ndim == 2:
        yield "CSR", Bad(x.to_sparse_csr(), ValueError, r"must be a dense tensor, got torch\.sparse_csr")
        yield "CSC", Bad(x.to_sparse_csc(), ValueError, r"must be a dense tensor, got torch\.sparse_csc")
        yield "nested", Bad(torch.nested.nested_tensor(list(x)), ValueError, "must be a dense tensor, got a nested")
        jagged = torch.nested.nested_tensor(list(x), layout=torch.jagged)
        yield "jagged", Bad(jagged, ValueError, "must be a dense tensor, got a nested")
    if x.dtype == torch.float32 and x.ndim:
        masked = torch.masked.masked_tensor(x.detach(), torch.ones_like(x) > 0)
        yield "masked", Bad(masked, ValueError, "must be a plain tensor, got MaskedTensor")
        yield "quantized", Bad(torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), TypeError, "got qint8")
        yield "lazy", Bad(nn.UninitializedParameter(), ValueError, "got an UninitializedParameter")
        if torch.backends.mkldnn.is_available():
            yield "mkldnn", Bad(x.to_mkldnn(), ValueError, r"must be a dense tensor, got torch\._mkldnn")
    for dtype in (torch.complex64, torch.float8_e4m3fn, torch.uint16, torch.uint64):
        yield str(dtype), Bad(x.to(dtype), TypeError, f"got {str(dtype).removeprefix('torch.')}")
    if is_mask:
        for number in (x.long(), x.to(torch.uint8), x.float(), x.bfloat16()):
            yield f"{number.dtype} mask", Bad(number, TypeError, r"must be bool, got \w+; \w+\.bool\(\) is true where")


NUMBERS = {
    "bool": Bad(True, TypeError, "must be a number.*got True"),
    "string": Bad("1", TypeError, "must be a number.*got '1'"),
    "tensor": Bad(torch.tensor(0.5), TypeError, r"must be a number.*got tensor\(0.5000\)"),
    "complex": Bad(0.5 + 0j, TypeError, "must be a number"),
    "fraction": Bad(Fraction(1, 2), TypeError, "must be a number"),
    "NaN": Bad(math.nan, ValueError, "must be a finite number.*got nan"),
    "inf": Bad(math.inf, ValueError, "must be a finite number.*got inf"),
    "beyond fp32": Bad(1e39, ValueError, r"got 1e\+39"),
    "an int beyond fp64": Bad(10**400, ValueError, "got an int of 1329 bits"),
    "an int too long to write": Bad(10**5000, ValueError, "got an int of 16610 bits"),
}
COUNT = {
    "bool": Bad(True, TypeError, "must be an int >= 1, got True"),
    "float": Bad(2.0, TypeError, "must be an int >= 1, got 2.0"),
    "tensor": Bad(torch.tensor(2), TypeError, r"must be an int >= 1, got tensor\(2\)"),
    "zero": Bad(0, ValueError, "must be an int >= 1, got 0"),
    "beyond int32": Bad(2**31, ValueError, "must be an int <= 2147483647, got 2147483648"),
    "beyond int64": Bad(10**400, ValueError, "must be an int <= 2147483647, got an int of 1329 bits"),
}
CHOICE = {
    "unknown": Bad("other", ValueError, "must be one of.*got 'other'"),
    "list": Bad(["torch"], (TypeError, ValueError), r"must be one of.*got \['torch'\]"),
    "number": Bad(1, (TypeError, ValueError), "must be one of.*got 1"),
}
BYTES = {
    "float": Bad(1e9, TypeError, "must be an int or None, got float"),
    "bool": Bad(True, TypeError, "must be an int or None, got bool"),
    "string": Bad("1G", TypeError, "must be an int or None, got str"),
    "beyond int64": Bad(10**400, ValueError, r"must be below 2\*\*63, got an int of 1329 bits"),
}
GROUP = {
    "string": Bad("world", TypeError, "must be a torch.distributed.ProcessGroup.*got str"),
    "not a member": Bad(-100, TypeError, "ProcessGroup that this process is in.*got int"),
}
CONFIG = {
    "dict": Bad({"dw_beta": 1.0}, TypeError, "must be an SRPOConfig.*got dict"),
    "class": Bad(sk.SRPOConfig, TypeError, "must be an SRPOConfig.*got type"),
}
OBJECT = {"list": Bad([1], TypeError, "must be .*got list"), "number": Bad(1, TypeError, "must be .*got int")}
FLAG = {"number": Bad(1, TypeError, "must be a bool, got 1"), "None": Bad(None, TypeError, "must be a bool, got None")}
# Of an argument that takes None, or has no wrong values of this kind, nothing is said here.
KINDS: dict[str, dict[str, Bad]] = (
    dict.fromkeys(("temperature", "logit_scale", "softcap", "alpha", "dw_beta", "success_threshold", "eps"), NUMBERS)
    | dict.fromkeys(("epsilon_low", "epsilon_high", "kl_coef", "entropy_coef", "log_ratio_clamp"), NUMBERS)
    | dict.fromkeys(("delta", "dual_clip", "distillation_is_clip"), NUMBERS)
    | dict.fromkeys(("world_size", "accumulation_steps", "topk"), COUNT)
    | dict.fromkeys(("backend", "engine", "divergence", "scale", "loss_type", "kl_type"), CHOICE)
    | dict.fromkeys(("distillation_mode", "reduction", "topk_of"), CHOICE)
    | dict.fromkeys(("vocab_parallel_group", "sequence_parallel_group", "group"), GROUP)
    | dict.fromkeys(("normalizers", "generator", "module", "function"), OBJECT)
    | dict.fromkeys(("add_tail", "count_inactive", "count_entropy", "whole_sequences"), FLAG)
    | {"workspace_bytes": BYTES, "config": CONFIG}
)
