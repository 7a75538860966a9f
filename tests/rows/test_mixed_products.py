"""bf16 operands with an fp32 result, by each path of the GPUs that there are: their operators, here on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from srpo_kernels import SRPOConfig, fused_loss, srpo_loss, token_stats
from srpo_kernels.engine import gemm, memory
from srpo_kernels.rows.spec import DIVERGENCES
from srpo_kernels.verify.rounding import GradientTerms
from tests.comparison import LEAVES, Results, assert_as_accurate, assert_same, gradients, run_loss, with_leaves
from tests.inputs import Inputs, cast, head_inputs, loss_inputs, workspace_floor
from tests.mixed_products import ANSWERS, WHERE, Operators
from tests.parity import check_loss, check_stats
from tests.strategies import Case, each_backend

# Their operators are here in the place of a CPU's own.
pytestmark = pytest.mark.interpreter

IDS = torch.arange(9)


def check_calls(operators: Operators) -> None:
    """The path is the one that the operators leave."""
    answer = ANSWERS[operators.version]
    assert set(operators.calls) == {"addmm": {"mm", "addmm"}, "mm": {"mm"}, "none": set()}[answer]


def test_a_device_is_asked(operators: Operators) -> None:
    assert gemm.mixed_products(WHERE, torch.bfloat16) == ANSWERS[operators.version]
    # Turing and Volta have tensor cores for fp16.
    assert gemm.mixed_products(WHERE, torch.float16) == ("mm" if operators.version == "2.8" else "addmm")


def test_a_product_in_another_dtype_than_it_says_is_none(operators: Operators, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Operators, "_product", lambda self, name, addend, a, b, dtype, out: out.zero_())
    assert gemm._ask.__wrapped__(WHERE, torch.bfloat16) == "none"


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
    inputs = loss_inputs(1, (4, 9), teacher_size=5, config=config)
    # Several products: the first one writes dW, and the others add to it.
    workspace_bytes = 3 * workspace_floor(33, 4, 2, backend)
    check_loss(Case(inputs, {"config": config}, workspace_bytes=workspace_bytes), torch.bfloat16, backend)
    check_calls(operators)


@each_backend
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_statistics(operators: Operators, divergence: str, backend: str) -> None:
    inputs = head_inputs(0, (4, 6), 8, 33, 5)
    workspace_bytes = 3 * workspace_floor(33, 4, 2, backend)
    check_stats(Case(inputs, {"divergence": divergence}, workspace_bytes=workspace_bytes), torch.bfloat16, backend)
    check_calls(operators)


@each_backend
@pytest.mark.parametrize("options", [{}, {"entropy_coef": 0.1, "softcap": 5.0}], ids=str)
def test_fp16_operands_are_those_of_logits_alone(operators: Operators, options: dict[str, Any], backend: str) -> None:
    config = SRPOConfig(**options)
    inputs = loss_inputs(1, (4, 6), teacher_size=5, config=config)
    workspace_bytes = 6 * workspace_floor(33, 4, 2, backend)
    check_loss(Case(inputs, {"config": config}, workspace_bytes=workspace_bytes), torch.float16, backend)
    assert set(operators.calls) == {"mm"}
    operators.calls.clear()
    check_stats(Case(head_inputs(0, (4, 6), 8, 33, 5), {"divergence": "jsd"}), torch.float16, backend)
    assert set(operators.calls) == {"mm"}


@each_backend
def test_an_objective_of_the_caller_s(operators: Operators, backend: str) -> None:
    inputs = head_inputs(0, (4, 6), 8, 33, 5)
    rounded = {name: x for name, x in cast(inputs, torch.bfloat16).items() if not name.startswith("teacher_b")}
    weights = torch.rand(4, 6)
    workspace_bytes = 2 * workspace_floor(33, 4, 2, backend)

    def run(function: Any, inputs: Inputs, **options: Any) -> Results:
        leaves = with_leaves(inputs)
        teacher = {name: leaves.pop(name) for name in list(leaves) if name.startswith("teacher")}
        return function(leaves, teacher, **options)

    def plain(leaves: Inputs, teacher: Inputs, **options: Any) -> Results:
        stats = reference.token_stats(**leaves, **teacher, divergence="forward_kl", **options)
        loss = ((stats.divergence - 0.3 * stats.log_probs) * weights * leaves["mask"]).sum()
        return {"loss": loss.detach(), "log_probs": stats.log_probs.detach()} | gradients(loss, leaves)

    def ours(leaves: Inputs, teacher: Inputs, **options: Any) -> Results:
        out = fused_loss(
            **leaves,
            **teacher,
            objective=lambda rows: (rows.divergence - 0.3 * rows.log_probs) * rows.weights,
            inputs={"weights": weights},
            config=SRPOConfig(divergence="forward_kl"),
            **options,
        )
        return {"loss": out.loss.detach(), "log_probs": out.log_probs} | gradients(out.loss, leaves)

    terms = GradientTerms()
    exact = run(plain, cast(rounded, torch.float64), project=terms)
    actual = run(ours, rounded, backend=backend, workspace_bytes=workspace_bytes)
    assert_as_accurate(actual, run(plain, rounded), exact, rounding=terms.rounding(rounded["weight"]))
    check_calls(operators)


@each_backend
@pytest.mark.parametrize("path", ["fused_loss", "token_stats"])
def test_dlogits_of_several_chunks_share_a_product(
    operators: Operators, path: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_ROWS_ACCELERATOR", 3)
    hidden, weight = torch.randn(9, 8, dtype=torch.bfloat16), torch.randn(33, 8, dtype=torch.bfloat16)
    leaves = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_()}

    def products(workspace_bytes: int) -> tuple[int, dict[str, Tensor]]:
        operators.calls.clear()
        options: dict[str, Any] = {"backend": backend, "workspace_bytes": workspace_bytes}
        if path == "fused_loss":
            loss = fused_loss(**leaves, target_ids=IDS, objective=lambda rows: -rows.log_probs, **options).loss
        else:
            loss = -token_stats(**leaves, target_ids=IDS, **options).log_probs.sum()
        found = gradients(loss, leaves)
        return operators.calls.total(), found

    # Rows in chunks of 3: as many dlogits wait, or all of them.
    row = workspace_floor(33, 4, 1, backend)
    (few, expected), (one, actual) = products(3 * row + 3 * 2 * 48), products(3 * row + 9 * 2 * 48)
    # Where none adds to a matrix, those of dW but the first one come in slabs.
    assert few - one == {"addmm": 4, "mm": 8, "none": 0}[ANSWERS[operators.version]]
    for name, values in expected.items():
        torch.testing.assert_close(actual[name], values, rtol=2e-2, atol=2e-2)


@each_backend
@pytest.mark.parametrize("options", [{}, {"loss_type": "gspo"}, {"dw_beta": 30.0}], ids=str)
def test_what_waits_is_the_same_whatever_is_frozen(operators: Operators, options: dict[str, Any], backend: str) -> None:
    config = SRPOConfig(**options)
    inputs = cast(loss_inputs(1, (4, 9), teacher_size=5, config=config), torch.bfloat16)
    how = {"config": config, "backend": backend, "workspace_bytes": 3 * workspace_floor(33, 4, 2, backend)}
    of_all = run_loss(srpo_loss, inputs, LEAVES, **how)
    for leaf in LEAVES:
        assert_same(run_loss(srpo_loss, inputs, (leaf,), **how), _of(of_all, leaf), 0.0)


def _of(results: Results, leaf: str) -> Results:
    return {name: x for name, x in results.items() if not name.startswith("grad") or name == f"grad {leaf}"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_other_dtypes_are_widened(operators: Operators, dtype: torch.dtype) -> None:
    inputs = loss_inputs(0, (4, 6), teacher_size=5)
    check_loss(Case(inputs, {"config": SRPOConfig()}), dtype, "torch")
    assert not operators.calls


def without_its_addend(self: Operators, name: str, addend: Tensor, a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    """The product alone."""
    return product(self, name, torch.zeros_like(addend), a, b, *rest)


def rounded(
    self: Operators, name: str, addend: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None
) -> Tensor:
    """A result in the operands' dtype, which then is widened."""
    result = product(self, name, addend, a, b, dtype, None).to(a.dtype).to(dtype)
    return result if out is None else out.copy_(result)


def without_the_last_slab(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    *first, (ids, slab) = slabs(weight, dtype)
    yield from [*first, (ids, torch.zeros_like(slab))]


product, slabs = Operators._product, gemm._slabs
FAULTS = {
    "2.10": [(Operators, "_product", without_its_addend), (Operators, "_product", rounded)],
    "2.8": [(Operators, "_product", rounded), (torch, "add", lambda x, rows, *, alpha, out: out.copy_(x))],
    "before Ampere": [(gemm, "_slabs", without_the_last_slab)],
}


def test_a_planted_fault_in_a_product_is_found(operators: Operators, monkeypatch: pytest.MonkeyPatch) -> None:
    test_the_loss(operators, {}, "torch")
    for place, name, fault in FAULTS[operators.version]:
        with monkeypatch.context() as patch, pytest.raises(AssertionError):
            patch.setattr(place, name, fault)
            test_the_loss(operators, {}, "torch")


def test_what_a_device_cannot_do_is_an_error(operators: Operators, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"2.8": ("addmm", "same dtype"), "before Ampere": ("mm", "NOT_SUPPORTED")}
    if operators.version not in more:
        pytest.skip("it can do all")
    answer, message = more[operators.version]
    monkeypatch.setattr(gemm, "mixed_products", lambda device, dtype: answer)
    with pytest.raises(RuntimeError, match=message):
        test_the_loss(operators, {}, "torch")


def test_a_cpu_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    # Widened operands are faster there, whatever its operators can do.
    monkeypatch.setattr(gemm, "_ask", None)
    assert gemm.mixed_products(WHERE, torch.bfloat16) == "none"
