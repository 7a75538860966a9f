"""``token_stats`` against the oracle, and its gradients against autograd's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import Tensor

import reference
from srpo_kernels import token_stats
from srpo_kernels.rows.spec import DIVERGENCES
from tests.comparison import Results, assert_as_accurate, assert_same, gradients, run_stats, with_leaves
from tests.inputs import Inputs, cast, for_backend, head_inputs
from tests.parity import check_stats, coefficients
from tests.strategies import Case, each_backend, stats_cases, thorough


@thorough
@given(stats_cases())
def test_fp64_parity(case: Case) -> None:
    upstream = coefficients(case.inputs)
    actual = run_stats(
        token_stats,
        case.inputs,
        upstream,
        case.leaves,
        workspace_bytes=case.workspace_bytes,
        **case.options,
    )
    expected = run_stats(reference.token_stats, case.inputs, upstream, case.leaves, **case.options)
    assert_same(actual, expected, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(case=stats_cases())
def test_low_precision_is_as_accurate_as_plain_torch_with_fp32_logits(dtype: torch.dtype, case: Case) -> None:
    check_stats(case, dtype, "torch")


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(divergence: str, softcap: float | None) -> None:
    inputs = with_leaves(head_inputs(5, (4,), 3, 7, teacher_size=2, spread=2.0))

    def statistics(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor | None, ...]:
        call = inputs | {"hidden": hidden, "weight": weight, "bias": bias}
        return token_stats(**call, divergence=divergence, alpha=0.3, softcap=softcap)[:3]

    assert torch.autograd.gradcheck(statistics, [inputs[name] for name in ("hidden", "weight", "bias")])


def test_a_vocabulary_of_several_blocks_and_slabs() -> None:
    inputs = cast(head_inputs(0, (7,), 65, 131_073), torch.bfloat16)
    exact_inputs, upstream = cast(inputs, torch.float64), coefficients(inputs)
    actual, naive = (run_stats(f, inputs, upstream) for f in (token_stats, reference.token_stats))
    assert_as_accurate(actual, naive, run_stats(reference.token_stats, exact_inputs, upstream))


def test_statistics_build_any_loss() -> None:
    inputs = head_inputs(1, (3, 5), 8, 33, teacher_size=5)

    def run(function: type) -> Results:
        call = with_leaves(inputs)
        out = function(**call)
        loss = torch.tanh(out.log_probs * out.divergence).sum() + (out.entropy * out.teacher_entropy).mean()
        return gradients(loss, call)

    assert_same(run(token_stats), run(reference.token_stats), 1e-9)


def test_one_statistic_alone_carries_gradient() -> None:
    for statistic in ("log_probs", "entropy", "divergence"):
        inputs = head_inputs(2, (3, 5), 8, 33)

        def run(function: type, inputs: Inputs = inputs, statistic: str = statistic) -> Results:
            call = with_leaves(inputs)
            return gradients(getattr(function(**call), statistic).sum(), call)

        assert_same(run(token_stats), run(reference.token_stats), 1e-9)


def test_teacher_entropy_is_detached_and_absent_without_a_teacher() -> None:
    inputs = with_leaves(head_inputs(2, (3, 5), 8, 33))
    assert not token_stats(**inputs).teacher_entropy.requires_grad
    stats = token_stats(**inputs | {"teacher_hidden": None})
    assert stats.divergence is None
    assert stats.teacher_entropy is None


@each_backend
def test_no_grad_gives_the_same_numbers(backend: str) -> None:
    inputs = for_backend(head_inputs(3, (3, 5), 8, 33), backend)
    with torch.no_grad():
        without = token_stats(**with_leaves(inputs), backend=backend)
    for x, y in zip(without, token_stats(**with_leaves(inputs), backend=backend), strict=True):
        assert not x.requires_grad
        torch.testing.assert_close(x, y.detach(), rtol=0, atol=0)


@each_backend
def test_masked_rows_are_never_read_and_come_back_as_zero(backend: str) -> None:
    inputs = for_backend(head_inputs(4, (4, 6), 8, 33, teacher_size=5), backend)
    expected = run_stats(token_stats, inputs, coefficients(inputs), backend=backend)
    masked = ~inputs["mask"]
    for name in ("hidden", "teacher_hidden"):
        inputs[name][masked] = torch.nan
    inputs["target_ids"][masked] = -100
    actual = run_stats(token_stats, inputs, coefficients(inputs), backend=backend)
    assert_same(actual, expected, 0.0)
    for name in ("log_probs", "entropy", "divergence", "teacher_entropy"):
        assert not actual[name][masked].any()


@each_backend
def test_no_row_at_all(backend: str) -> None:
    inputs = for_backend(head_inputs(4, (4, 6), 8, 33), backend)
    inputs["mask"] = torch.zeros_like(inputs["mask"])
    results = run_stats(token_stats, inputs, coefficients(inputs), backend=backend)
    assert all(not value.any() for value in results.values())


@each_backend
def test_a_second_backward_gives_the_same(backend: str) -> None:
    inputs = with_leaves(for_backend(head_inputs(6, (3, 5), 8, 33), backend))
    out = token_stats(**inputs, backend=backend)
    loss = (out.log_probs + out.entropy + out.divergence).sum()
    first = torch.autograd.grad(loss, inputs["weight"], retain_graph=True)
    second = torch.autograd.grad(loss, inputs["weight"])
    torch.testing.assert_close(first, second, rtol=0, atol=0)
