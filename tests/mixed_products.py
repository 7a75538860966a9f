"""Products of bf16 and fp16 operands with an fp32 result, as GPUs have them, for the CPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

WHERE = torch.device("cpu")
ANSWERS = {"2.10": "addmm", "2.8": "mm", "before Ampere": "none"}


@dataclass
class Operators:
    """``mm`` and ``addmm`` with an ``out_dtype`` as CUDA has them in a version of torch, dtype rules and all."""

    version: str
    calls: Counter[str] = field(default_factory=Counter)

    def mm(self, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
        if self.version == "before Ampere" and a.dtype == torch.bfloat16:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasGemmEx")
        check(a.dtype == b.dtype, "input dtypes must be the same")
        return self._product("mm", torch.zeros((), dtype=out_dtype), a, b, out_dtype, out)

    def addmm(
        self,
        addend: Tensor,
        a: Tensor,
        b: Tensor,
        out_dtype: torch.dtype,
        *,
        beta: float = 1,
        alpha: float = 1,
        out: Tensor | None = None,
    ) -> Tensor:
        if self.version == "2.8":
            check(addend.dtype == b.dtype, "self and mat2 must have the same dtype")
        check(addend.dtype in (a.dtype, out_dtype), "self dtype must match either out_dtype or mat1 dtype")
        return self._product("addmm", beta * addend, alpha * a, b, out_dtype, out)

    def _product(
        self, name: str, addend: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, out: Tensor | None
    ) -> Tensor:
        check(out is None or out.dtype == out_dtype, "out_dtype must be the same as the dtype of the out tensor")
        check(
            out_dtype in (a.dtype, torch.float32) and a.dtype.itemsize <= 4,
            "out_dtype must be the same as input dtype or fp32 for fp16/bf16 inputs",
        )
        self.calls[name] += 1
        result = addend + a.to(out_dtype) @ b.to(out_dtype)
        return result if out is None else out.copy_(result)


def check(kept: bool, message: str) -> None:
    if not kept:
        raise RuntimeError(message)
