"""``vocab_parallel_group``: the LM head in shards gives what it gives as a whole, on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from srpo_kernels import SRPOConfig, srpo_loss, token_stats
from srpo_kernels.losses.options import DISTILLATION_MODES
from srpo_kernels.losses.registry import POLICY_LOSSES
from srpo_kernels.rows.spec import DIVERGENCES
from tests.api.test_loss_parity import EACH_OPTION
from tests.comparison import Results, assert_as_accurate, assert_same, condition_of, run_loss, run_stats
from tests.inputs import SHARED, Inputs, cast, loss_inputs
from tests.parity import coefficients
from tests.processes import interpreted, needs_gloo, run_ranks
from tests.strategies import Case, loss_cases, stats_cases

pytestmark = needs_gloo

Calls = list[tuple[Case, list[int]]]


def draw(strategy: st.SearchStrategy[Case], count: int, ranks: int) -> Calls:
    """Cases with the sizes of their shards, at least one row each."""
    calls: Calls = []

    @settings(max_examples=count, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy.filter(lambda case: len(case.inputs["weight"]) >= ranks))
    def collect(case: Case) -> None:
        calls.append((case, cut(len(case.inputs["weight"]), ranks, len(calls))))

    collect()
    return calls


def cut(vocab_size: int, ranks: int, seed: int) -> list[int]:
    """Uneven sizes; every third time the first shard has one row."""
    generator = torch.Generator().manual_seed(seed)
    bounds = (torch.randperm(vocab_size - 1, generator=generator)[: ranks - 1] + 1).sort().values.tolist()
    if seed % 3 == 0:
        bounds = [1, *bounds[1:]] if 1 not in bounds[1:] else bounds
    return [stop - start for start, stop in pairwise([0, *bounds, vocab_size])]


def shard_of(inputs: Inputs, sizes: list[int], rank: int) -> Inputs:
    return {k: x.split(sizes)[rank] if k in SHARED and x is not None else x for k, x in inputs.items()}


def sharded(
    rank: int, run: Callable[..., Results], function: Callable[..., Any], calls: Calls, **options: Any
) -> list[Results]:
    return [
        run(
            function,
            shard_of(case.inputs, sizes, rank),
            leaves=case.leaves,
            workspace_bytes=case.workspace_bytes,
            vocab_parallel_group=dist.group.WORLD,
            **case.options,
            **options,
        )
        for case, sizes in calls
    ]


def run_losses(rank: int, calls: Calls, backend: str) -> list[Results]:
    import tests.conftest  # noqa: F401  Triton's interpreter as the other tests have it.

    return sharded(rank, run_loss, srpo_loss, calls, backend=backend)


def run_statistics(rank: int, calls: Calls, backend: str) -> list[Results]:
    import tests.conftest  # noqa: F401

    return [
        sharded(rank, run_stats, token_stats, [call], coefficients=coefficients(call[0].inputs), backend=backend)[0]
        for call in calls
    ]


def assembled(of_ranks: list[list[Results]]) -> list[Results]:
    """One result per case: shards' gradients one after the other, all else the same to the last bit on all ranks."""
    whole = []
    for results in zip(*of_ranks, strict=True):
        for name, value in results[0].items():
            if name not in ("grad weight", "grad bias"):
                assert all(torch.equal(other[name], value) for other in results), name
        joined = {
            name: torch.cat([r[name] for r in results]) for name in ("grad weight", "grad bias") if name in results[0]
        }
        whole.append(results[0] | joined)
    return whole


@pytest.mark.parametrize(("ranks", "count"), [(2, 100), (4, 25)])
def test_any_loss_in_fp64(ranks: int, count: int) -> None:
    calls = draw(loss_cases(), count, ranks)
    for (case, sizes), actual in zip(calls, assembled(run_ranks(run_losses, ranks, calls, "torch")), strict=True):
        assert len(sizes) == ranks
        alone = run_loss(srpo_loss, case.inputs, case.leaves, workspace_bytes=case.workspace_bytes, **case.options)
        assert_same(actual, alone, 1e-10)
        assert_same(actual, run_loss(reference.srpo_loss, case.inputs, case.leaves, **case.options), 1e-9)


@pytest.mark.parametrize(("ranks", "count"), [(2, 50), (4, 15)])
def test_any_statistics_in_fp64(ranks: int, count: int) -> None:
    calls = draw(stats_cases(), count, ranks)
    for (case, _), actual in zip(calls, assembled(run_ranks(run_statistics, ranks, calls, "torch")), strict=True):
        upstream = coefficients(case.inputs)
        options = case.options | {"workspace_bytes": case.workspace_bytes}
        assert_same(actual, run_stats(token_stats, case.inputs, upstream, case.leaves, **options), 1e-10)
        oracle = run_stats(reference.token_stats, case.inputs, upstream, case.leaves, **case.options)
        assert_same(actual, oracle, 1e-9)


def in_dtype(calls: Calls, dtype: torch.dtype) -> Calls:
    return [(replace(case, inputs=cast(case.inputs, dtype)), sizes) for case, sizes in calls]


@pytest.mark.parametrize(("backend", "count"), [("torch", 80), pytest.param("triton", 12, marks=interpreted)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_loss_is_as_accurate_as_plain_torch_with_fp32_logits(dtype: torch.dtype, backend: str, count: int) -> None:
    calls = in_dtype(draw(loss_cases(), count, 2), dtype)
    check_losses(calls, assembled(run_ranks(run_losses, 2, calls, backend)))


def check_losses(calls: Calls, results: list[Results]) -> None:
    for (case, _), actual in zip(calls, results, strict=True):
        naive = run_loss(reference.srpo_loss, case.inputs, case.leaves, **case.options)
        exact = run_loss(reference.srpo_loss, cast(case.inputs, torch.float64), case.leaves, **case.options)
        condition = condition_of(case.options["config"], exact)
        assert_as_accurate(actual, naive, exact, share=1.0 / len(exact["log_probs"]), condition=condition)


@pytest.mark.parametrize(("backend", "count"), [("torch", 40), pytest.param("triton", 12, marks=interpreted)])
def test_any_statistics_are_as_accurate_as_plain_torch_with_fp32_logits(backend: str, count: int) -> None:
    calls = in_dtype(draw(stats_cases(), count, 2), torch.float32)
    for (case, _), actual in zip(calls, assembled(run_ranks(run_statistics, 2, calls, backend)), strict=True):
        upstream = coefficients(case.inputs)
        naive = run_stats(reference.token_stats, case.inputs, upstream, case.leaves, **case.options)
        exact = run_stats(
            reference.token_stats, cast(case.inputs, torch.float64), upstream, case.leaves, **case.options
        )
        assert_as_accurate(actual, naive, exact)


def each_option(rows: tuple[int, ...]) -> Calls:
    configs = [SRPOConfig(**options) for options in EACH_OPTION]
    inputs = [loss_inputs(3, rows, teacher_size=5, spread=2.0, config=config) for config in configs]
    for x, config in zip(inputs, configs, strict=True):
        if POLICY_LOSSES[config.loss_type].whole_batch:
            # Of tokens whose covariances are equal, which are taken is chance.
            x["advantages"] = torch.randn(rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cases = [Case(x, {"config": config}) for x, config in zip(inputs, configs, strict=True)]
    return [(case, [9, 1, 21, 2] if i % 2 else [1, 30, 1, 1]) for i, case in enumerate(cases)]


def test_each_option_in_fp64() -> None:
    calls = each_option((6, 7))
    for (case, _), actual in zip(calls, assembled(run_ranks(run_losses, 4, calls, "torch")), strict=True):
        assert_same(actual, run_loss(reference.srpo_loss, case.inputs, **case.options), 1e-9)


@interpreted
def test_each_option_in_triton() -> None:
    calls = [(case, [sizes[0], 33 - sizes[0]]) for case, sizes in in_dtype(each_option((3, 4)), torch.float32)]
    check_losses(calls, assembled(run_ranks(run_losses, 2, calls, "triton")))


def extreme(mode: str, gap: float, divergence: str) -> Case:
    """Logits whose exponentials leave the range of fp32."""
    inputs = {
        "hidden": torch.tensor([[[gap, gap - 1, 0.0, 1.0]]]),
        "weight": torch.eye(4),
        "target_ids": torch.tensor([[0]]),
        "sdpo_mask": torch.tensor([True]),
        "teacher_hidden": torch.tensor([[[0.0, 1.0, 2.0, -gap]]]),
    }
    config = SRPOConfig(distillation_mode=mode, topk=2, divergence=divergence, dw_beta=0.0)
    return Case(inputs, {"config": config})


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted)])
def test_logits_whose_exponentials_leave_the_range_of_fp32(backend: str) -> None:
    gaps = {"full": 150.0, "topk": 80.0, "sampled": 150.0}
    cases = [extreme(mode, gap, divergence) for mode, gap in gaps.items() for divergence in DIVERGENCES]
    calls = [(case, sizes) for case in cases for sizes in ([1, 3], [2, 2], [3, 1])]
    results = assembled(run_ranks(run_losses, 2, calls, backend))
    assert all(value.isfinite().all() for result in results for value in result.values())
    check_losses(calls, results)


def run_twice(rank: int, calls: Calls) -> list[Results]:
    first, second = (run_losses(rank, calls, "torch") for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert_same(x, y, 0.0)
    return first


def test_results_are_the_same_from_run_to_run_and_however_the_vocabulary_is_cut() -> None:
    inputs = cast(loss_inputs(0, (6, 7), 16, 129, teacher_size=16), torch.float32)
    case = Case(inputs, {"config": SRPOConfig()})
    cuts = ([43, 43, 43], [1, 1, 127], [100, 28, 1], [2, 125, 2])
    results = assembled(run_ranks(run_twice, 3, [(case, sizes) for sizes in cuts]))
    alone = run_loss(srpo_loss, inputs)
    exact = run_loss(reference.srpo_loss, cast(inputs, torch.float64), config=SRPOConfig())
    for result in results:
        assert_as_accurate(result, alone, exact, share=1.0 / 42, condition=5.0)


EDGES: dict[str, Inputs] = {
    "nothing valid": {"mask": torch.zeros(4, 6) > 0},
    "nothing active": {"advantages": torch.zeros(4).double(), "sdpo_mask": torch.zeros(4) > 0},
    "no distillation": {"sdpo_mask": torch.zeros(4) > 0},
    "no teacher": dict.fromkeys(("sdpo_mask", "teacher_hidden", "teacher_weight", "teacher_bias")),
    "distillation alone": {"sdpo_mask": torch.ones(4) > 0, "advantages": None},
    "a shared head": {"teacher_hidden": torch.randn(4, 6, 8).double(), "teacher_weight": None, "teacher_bias": None},
}


def test_branches_without_rows() -> None:
    inputs = loss_inputs(0, (4, 6), teacher_size=5)
    calls = [(Case(inputs | edge, {"config": SRPOConfig()}), [30, 3]) for edge in EDGES.values()]
    for (case, _), actual in zip(calls, assembled(run_ranks(run_losses, 2, calls, "torch")), strict=True):
        assert_same(actual, run_loss(reference.srpo_loss, case.inputs, **case.options), 1e-9)


def count_nonfinite(rank: int, backend: str) -> list[Tensor]:
    import tests.conftest  # noqa: F401

    inputs = cast(loss_inputs(0, (4, 6), teacher_size=5), torch.float32)
    inputs["weight"][20, 1] = torch.nan
    options = {"backend": backend, "vocab_parallel_group": dist.group.WORLD}
    return [
        srpo_loss(**shard_of(inputs, [9, 24], rank), config=SRPOConfig(distillation_mode=mode), **options).metrics[
            "nonfinite_rows"
        ]
        for mode in DISTILLATION_MODES
    ]


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted)])
def test_a_shard_that_went_to_nan_is_seen_on_every_rank(backend: str) -> None:
    inputs = loss_inputs(0, (4, 6))
    active = inputs["mask"] & (inputs["sdpo_mask"] | (inputs["advantages"] != 0))[:, None]
    assert run_ranks(count_nonfinite, 2, backend) == [[active.sum()] * len(DISTILLATION_MODES)] * 2
