"""bf16 operands with an fp32 result, by each path of the GPUs that there are: their operators, here on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from reference.logits import transform
from srpo_kernels import SRPOConfig
from srpo_kernels.engine import gemm
from srpo_kernels.rows.contract import DIVERGENCES
from tests.parity import check_loss, check_stats
from tests.strategies import Case, each_backend, head_inputs, loss_inputs, workspace_floor

WHERE = torch.device("cpu")
ANSWERS = {"2.10": "addmm", "2.8": "mm", "before Ampere": "none"}


@dataclass
class Operators:
    """``mm`` and ``addmm`` with an ``out_dtype`` as CUDA has them in a version of torch, dtype rules and all."""

    version: str
    calls: Counter[str] = field(default_factory=Counter)

    def mm(self, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
        if self.version == "before Ampere":
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


@pytest.fixture(params=ANSWERS)
def operators(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Operators]:
    """The CPU as a GPU of some version, in slabs of a few rows."""
    operators = Operators(request.param)
    library = torch.library.Library("aten", "IMPL")
    for name in ("mm", "addmm"):
        for overload in ("dtype", "dtype_out"):
            library.impl(f"{name}.{overload}", getattr(operators, name), "CPU")
    answer = gemm._ask.__wrapped__(WHERE)
    monkeypatch.setattr(gemm, "mixed_products", lambda device: answer)
    monkeypatch.setattr(gemm, "_SLAB_ELEMENTS", 100)
    if answer != "none":
        monkeypatch.setattr("reference.logits.transform", with_rounded_gradient)
    operators.calls.clear()
    yield operators
    library._destroy()


def with_rounded_gradient(logits: Tensor, **options: Any) -> Tensor:
    """The transform of logits whose gradient in fp32 is rounded, as the operand of a product in bf16 is."""
    if logits.requires_grad and logits.dtype == torch.float32:
        logits.register_hook(lambda gradient: gradient.bfloat16().float())
    return transform(logits, **options)


def check_calls(operators: Operators) -> None:
    """The path is the one that the operators leave."""
    answer = ANSWERS[operators.version]
    assert set(operators.calls) == {"addmm": {"mm", "addmm"}, "mm": {"mm"}, "none": set()}[answer]


def test_a_device_is_asked(operators: Operators) -> None:
    assert gemm.mixed_products(WHERE) == ANSWERS[operators.version]


def test_a_product_in_another_dtype_than_it_says_is_none(operators: Operators, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Operators, "_product", lambda self, name, addend, a, b, dtype, out: out.zero_())
    assert gemm._ask.__wrapped__(WHERE) == "none"


OPTIONS: list[dict[str, Any]] = [
    *({"divergence": divergence} for divergence in DIVERGENCES),
    {"loss_type": "gspo", "entropy_coef": 0.1},
    {"distillation_mode": "topk", "topk": 3},
    {"distillation_mode": "sampled"},
    {"dw_beta": 30.0},
]


@each_backend
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_loss(operators: Operators, options: dict[str, Any], backend: str) -> None:
    config = SRPOConfig(**options)
    inputs = loss_inputs(1, (4, 6), teacher_size=5, config=config)
    # Several chunks: the first one writes dW, and the others add to it.
    workspace_bytes = 6 * workspace_floor(33, 4, 2, backend)
    check_loss(Case(inputs, {"config": config}, workspace_bytes=workspace_bytes), torch.bfloat16, backend)
    check_calls(operators)


@each_backend
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_statistics(operators: Operators, divergence: str, backend: str) -> None:
    inputs = head_inputs(0, (4, 6), 8, 33, 5)
    workspace_bytes = 3 * workspace_floor(33, 4, 2, backend)
    check_stats(Case(inputs, {"divergence": divergence}, workspace_bytes=workspace_bytes), torch.bfloat16, backend)
    check_calls(operators)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_other_dtypes_are_widened(operators: Operators, dtype: torch.dtype) -> None:
    inputs = loss_inputs(0, (4, 6), teacher_size=5)
    check_loss(Case(inputs, {"config": SRPOConfig()}), dtype, "torch")
    assert not operators.calls


def test_a_cpu_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    # Widened operands are faster there, whatever its operators can do.
    monkeypatch.setattr(gemm, "_ask", None)
    assert gemm.mixed_products(WHERE) == "none"
