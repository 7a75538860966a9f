"""The planner: every row once, no chunk beyond the workspace, no sequence cut, and what it says it costs."""

from __future__ import annotations

from itertools import accumulate, chain, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srpo_kernels import SRPOConfig
from srpo_kernels.engine.memory import RowMemory
from srpo_kernels.engine.order import RowOrder, order_rows
from srpo_kernels.engine.plan import Plan, make_plan, row_chunks, sequence_groups
from srpo_kernels.engine.row_values import RowChecks
from srpo_kernels.engine.srpo import moving
from srpo_kernels.engine.workspace import row_stride
from srpo_kernels.losses.derived import Derivation
from srpo_kernels.losses.options import LOSS_TYPES
from srpo_kernels.losses.registry import POLICY_LOSSES
from srpo_kernels.losses.sequences import Sequences
from srpo_kernels.losses.srpo import SRPOObjective
from srpo_kernels.rows.contract import Scratch

CPU = torch.device("cpu")
SCRATCH = Scratch(5, 100)


def rows_of(chunks: list[slice]) -> list[int]:
    return list(chain.from_iterable(range(chunk.start, chunk.stop) for chunk in chunks))


def sizes_of(chunks: list[slice]) -> list[int]:
    return [chunk.stop - chunk.start for chunk in chunks]


@given(num_rows=st.integers(0, 5000), capacity=st.integers(1, 700))
def test_row_chunks_cover_the_rows_in_order_with_the_fewest_even_chunks(num_rows: int, capacity: int) -> None:
    chunks = row_chunks(num_rows, capacity)
    assert rows_of(chunks) == list(range(num_rows))
    assert len(chunks) == -(-num_rows // capacity)
    assert all(1 <= size <= capacity for size in sizes_of(chunks))
    assert max(sizes_of(chunks), default=0) - min(sizes_of(chunks), default=0) <= 1


@given(sizes=st.lists(st.integers(0, 40), max_size=30), capacity=st.integers(1, 50))
def test_sequence_groups_are_as_large_as_fits(sizes: list[int], capacity: int) -> None:
    groups = sequence_groups(sizes, capacity)
    assert sum(sum(sizes[group]) for group in groups) == sum(sizes)
    assert all(a.stop == b.start for a, b in pairwise(groups))
    for group in groups:
        # More than fits is one sequence, which is what makes it necessary.
        assert sum(sizes[group]) <= capacity or sum(size > 0 for size in sizes[group]) == 1
    for group, after in pairwise(groups):
        assert sum(sizes[group]) + next(size for size in sizes[after] if size) > capacity


@given(
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30)), max_size=20), workspace_rows=st.integers(2, 60)
)
def test_segments_cover_the_rows_in_order_and_cut_no_sequence(
    lengths: list[tuple[int, int]], workspace_rows: int
) -> None:
    taught, alone = ([pair[i] for pair in lengths] for i in (0, 1))
    order = RowOrder(torch.arange(sum(taught)), 1000 + torch.arange(sum(alone)), torch.arange(0))
    memory, workspace = RowMemory(1000, 8, Scratch(0, 0), CPU), workspace_rows * row_stride(1000) * 8
    plan = make_plan(order, memory, taught_lengths=taught, alone_lengths=alone, workspace_bytes=workspace, gradients=2)
    for kind, rows, counts in ((0, order.taught, taught), (1, order.alone, alone)):
        covered = [torch.cat([chunk[kind] for chunk in segment]).tolist() for segment in plan.segments]
        assert list(chain.from_iterable(covered)) == rows.tolist()
        ends = [0, *accumulate(counts)]
        assert all(end in ends for end in accumulate(map(len, covered)))
    assert all(chunk.logits <= workspace_rows for segment in plan.segments for chunk in segment)
    for segment in plan.segments:
        if len(segment) > 1:
            # Several chunks hold one long sequence, which is what makes them necessary.
            assert tuple(sum(len(chunk[kind]) for chunk in segment) for kind in (0, 1)) in lengths


@given(
    vocab_size=st.integers(1, 300_000),
    itemsize=st.sampled_from([4, 8]),
    copy_itemsize=st.sampled_from([0, 2]),
    scratch=st.builds(Scratch, st.integers(0, 6), st.integers(0, 40)),
    models=st.sampled_from([1, 2]),
    times=st.floats(1, 5000),
)
def test_a_chunk_and_its_scratch_fit_into_the_workspace(
    vocab_size: int, itemsize: int, copy_itemsize: int, scratch: Scratch, models: int, times: float
) -> None:
    memory = RowMemory(vocab_size, itemsize, scratch, CPU, copy_itemsize)
    workspace = int(memory.floor(models) * times)
    capacity = memory.capacity(models, workspace)
    assert capacity >= 1
    logits = capacity * (models * itemsize + copy_itemsize)
    scratch_logits = scratch.blocks * min(capacity, scratch.rows) * itemsize
    assert (logits + scratch_logits) * row_stride(vocab_size) <= workspace


def test_a_larger_workspace_never_makes_smaller_chunks() -> None:
    memory = RowMemory(1000, 4, Scratch(5, 9), CPU)
    capacities = [memory.capacity(2, memory.floor(2) * times) for times in range(1, 2000)]
    assert capacities == sorted(capacities)
    assert capacities[-1] > capacities[0]


SKIPPING = [name for name in LOSS_TYPES if POLICY_LOSSES[name].zero_without_advantage]


def order(config: SRPOConfig) -> RowOrder:
    """Two sequences of the policy branch (7, interleaved with 3), one distilled (5), one masked row."""
    sequences = torch.tensor([1, 0, 2, 0, 1, 2, 0])
    routed = sequences == 2
    valid = torch.tensor([True, True, True, True, True, True, False])
    advantages = torch.tensor([0.0, 0.5, 1.0, 0.0, 0.0, 0.0, 9.0])
    moves = moving(valid & ~routed, advantages, Sequences(sequences, 3), config)
    checks = RowChecks.of(sequences, valid, routed, 3, has_teacher=True, has_advantages=True)
    rows, lengths, _ = order_rows(valid, routed, moves, sequences, 3, checks)
    for kind, counts in zip(rows, lengths, strict=True):
        assert torch.bincount(sequences[kind], minlength=3).tolist() == counts
    return rows


@pytest.mark.parametrize("loss_type", [x for x in SKIPPING if not POLICY_LOSSES[x].whole_sequences])
def test_rows_that_cannot_move_a_weight_are_set_apart(loss_type: str) -> None:
    rows = order(SRPOConfig(loss_type=loss_type))
    assert [x.tolist() for x in rows] == [[2, 5], [1], [3, 0, 4]]


@pytest.mark.parametrize("loss_type", [x for x in SKIPPING if POLICY_LOSSES[x].whole_sequences])
def test_a_token_with_advantage_0_moves_the_ratio_of_its_sequence(loss_type: str) -> None:
    rows = order(SRPOConfig(loss_type=loss_type))
    assert [x.tolist() for x in rows] == [[2, 5], [1, 3], [0, 4]]


@pytest.mark.parametrize("options", [{"kl_coef": 0.1}, {"entropy_coef": -0.1}], ids=str)
def test_every_policy_row_is_active_under_a_kl_or_entropy_term(options: dict[str, float]) -> None:
    rows = order(SRPOConfig(**options))
    assert rows.alone.tolist() == [1, 3, 0, 4]
    assert rows.inactive.tolist() == []


def plan_of(
    rows: RowOrder,
    lengths: list[int] | None = None,
    gradients: int = 2,
    workspace_rows: int = 100,
    scratch: Scratch = SCRATCH,
    **options: bool,
) -> Plan:
    return make_plan(
        rows,
        RowMemory(1000, 8, scratch, CPU),
        alone_lengths=lengths,
        workspace_bytes=workspace_rows * row_stride(1000) * 8,
        gradients=gradients,
        **options,
    )


def test_the_cost_is_3_products_per_policy_row_and_4_per_distillation_row() -> None:
    rows = RowOrder(torch.arange(20), torch.arange(30), torch.arange(5))
    plan = plan_of(rows)
    assert (plan.student_products, plan.teacher_products) == (3 * 30 + 3 * 20, 20)
    assert plan.inactive == []
    frozen_weight, forward = plan_of(rows, gradients=1), plan_of(rows, gradients=0)
    assert (frozen_weight.student_products, forward.student_products) == (2 * 50, 50)
    assert plan_of(rows, count_inactive=True).student_products == 3 * 50 + 5


def test_a_long_sequence_costs_one_more_product_of_all_but_its_last_chunk() -> None:
    rows = RowOrder(torch.arange(0), torch.arange(34), torch.arange(0))
    plan = plan_of(rows, [4, 25, 5], workspace_rows=60)
    assert [len(segment) for segment in plan.segments] == [1, 3, 1]
    assert plan.student_products == 3 * 34 + sum(len(chunk.alone) for chunk in plan.segments[1][:-1])
    assert plan_of(rows, [4, 25, 5], workspace_rows=10_000).student_products == 3 * 34


def test_weights_beyond_the_range_of_fp32_cost_a_teacher_pass() -> None:
    rows = RowOrder(torch.arange(20), torch.arange(0), torch.arange(0))
    derivation = Derivation.of(SRPOConfig(), None, 1000, has_support=False)
    assert not SRPOObjective(SRPOConfig(dw_beta=8.0), None, 20, 0, 1000, derivation).teacher_first
    assert SRPOObjective(SRPOConfig(dw_beta=30.0), None, 20, 0, 1000, derivation).teacher_first
    assert plan_of(rows, teacher_first=True).teacher_products == 2 * 20
    assert not SRPOObjective(SRPOConfig(dw_beta=30.0), torch.zeros(()), 20, 0, 1000, derivation).teacher_first
    assert plan_of(rows).teacher_products == 20


def test_the_buffer_holds_both_models_of_the_longest_chunk() -> None:
    rows = RowOrder(torch.arange(20), torch.arange(30), torch.arange(0))
    # A workspace for the whole batch, and one for a single row of both models.
    assert plan_of(rows, workspace_rows=10_000).buffer_rows == 2 * 20 + 30
    assert plan_of(rows, workspace_rows=7).buffer_rows == 2
    nothing = RowOrder(*(torch.arange(0) for _ in range(3)))
    assert plan_of(nothing).buffer_rows == 0


def shared_rows(plan: Plan) -> int:
    """Rows without a teacher beside the last ones that have one."""
    return sum(len(chunk.alone) for segment in plan.segments for chunk in segment if len(chunk.taught))


def test_the_last_distillation_chunk_shares_its_products_with_policy_rows_that_fit_beside_it() -> None:
    rows = RowOrder(torch.arange(20), torch.arange(30), torch.arange(5))
    both, alone = (plan_of(rows, workspace_rows=n, scratch=Scratch(0, 0)) for n in (70, 69))
    assert (shared_rows(both), both.buffer_rows) == (30, 70)
    assert (shared_rows(alone), alone.buffer_rows) == (0, 40)
    # No other chunk is cut for it, and no product is added.
    assert both.student_products == alone.student_products
    # A long sequence is computed twice, in chunks of its own.
    assert shared_rows(plan_of(rows, [30], workspace_rows=10_000)) == 30
    assert shared_rows(plan_of(rows, [30], workspace_rows=60)) == 0
    only_policy = RowOrder(torch.arange(0), torch.arange(30), torch.arange(0))
    assert shared_rows(plan_of(only_policy, workspace_rows=10_000)) == 0


@pytest.mark.parametrize(("distilled", "policy", "shared"), [(600, 848, 848), (600, 849, 0), (1024, 1, 0)])
def test_an_accelerator_shares_within_the_rows_of_both_models_of_a_chunk(
    distilled: int, policy: int, shared: int
) -> None:
    plan = make_plan(
        RowOrder(torch.arange(distilled), torch.arange(policy), torch.arange(0)),
        RowMemory(1000, 4, SCRATCH, torch.device("meta"), copy_itemsize=2),
        workspace_bytes=None,
        gradients=2,
    )
    assert shared_rows(plan) == shared
    assert plan.buffer_rows <= 2 * 1024


@given(
    workspace=st.floats(1, 60),
    distilled=st.integers(0, 40),
    policy=st.integers(0, 60),
    scratch=st.builds(Scratch, st.integers(0, 3), st.integers(0, 9)),
    lengths=st.sampled_from([None, 1, 7]),
)
def test_logits_and_dlogits_that_wait_fit_into_the_workspace(
    workspace: float, distilled: int, policy: int, scratch: Scratch, lengths: int | None
) -> None:
    memory = RowMemory(1000, 4, scratch, torch.device("meta"), copy_itemsize=2)
    order = RowOrder(torch.arange(distilled), torch.arange(policy), torch.arange(0))
    workspace_bytes = int(workspace * memory.floor(2))
    sizes = None if lengths is None else [min(lengths, policy - i) for i in range(0, policy, lengths)]
    plan = make_plan(order, memory, alone_lengths=sizes, workspace_bytes=workspace_bytes, gradients=2)
    chunks = [chunk.num_rows for segment in plan.segments for chunk in segment]
    longest = max(chunks, default=0)
    assert longest <= plan.waiting_rows <= distilled + policy
    rows = 4 * (plan.buffer_rows + scratch.blocks * min(scratch.rows, longest)) + 2 * plan.waiting_rows
    assert rows * row_stride(1000) <= workspace_bytes
    assert (sum(chunks) > 0) <= plan.head_products <= len(chunks)


def test_an_accelerator_takes_the_dlogits_of_several_chunks_to_a_product() -> None:
    rows = RowOrder(torch.arange(2048), torch.arange(8192), torch.arange(0))

    def plan(workspace_bytes: int | None, itemsize: int = 2, lengths: list[int] | None = None) -> Plan:
        memory = RowMemory(1000, 4, Scratch(0, 0), torch.device("meta"), copy_itemsize=itemsize)
        return make_plan(rows, memory, alone_lengths=lengths, workspace_bytes=workspace_bytes, gradients=2)

    default = plan(None)
    assert (default.buffer_rows, default.waiting_rows, default.head_products) == (2 * 1024, 4096, 3)
    # dlogits that take the place of their logits wait for nothing.
    assert (plan(None, itemsize=0).waiting_rows, plan(None, itemsize=0).head_products) == (0, 6)
    row = row_stride(1000)
    large = plan(row * (4 * 2048 + 2 * 6144))
    assert (large.buffer_rows, large.waiting_rows, large.head_products) == (2 * 1024, 6144, 2)
    # Of much memory logits have their part: half as many rows.
    assert (plan(row * 8 * 4096).buffer_rows, plan(row * 8 * 4096).waiting_rows) == (4096, 8192)
    # Where sequences should not be cut, a larger workspace is for their logits.
    assert plan(row * 6 * 8192, lengths=[4096, 4096]).student_products == plan(None).student_products
    assert plan(row * 6 * 8192, lengths=[4096, 4096]).buffer_rows == 8192
