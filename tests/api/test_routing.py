from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import reference
from srpo_kernels.rollout.routing import ADVANTAGE_SCALES, group_advantages, route_samples

GROUP_IDS = st.sampled_from([-5, 0, 3, 4, 2**40])


@st.composite
def rollouts(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Rewards and group ids, in any order, from groups of one to all in one group."""
    rows = draw(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0, -2.0]), GROUP_IDS), max_size=12))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    rewards, group_ids = zip(*rows, strict=True) if rows else ((), ())
    return torch.tensor(rewards, dtype=dtype), torch.tensor(group_ids, dtype=torch.int64)


@given(rollouts(), st.sampled_from([0.1, 0.5, 2]), st.integers(0, 99), st.booleans())
def test_routing_agrees_with_the_reference(
    batch: tuple[Tensor, Tensor], threshold: float, seed: int, with_feedback: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    feedback = torch.rand(len(batch[0]), generator=generator) < 0.5 if with_feedback else None
    routing = route_samples(*batch, threshold, feedback, generator)
    expected = reference.route_samples(*batch, threshold, feedback)
    assert routing.correct.tolist() == expected.correct.tolist()
    assert routing.sdpo_mask.tolist() == expected.sdpo_mask.tolist()
    assert routing.teacher_index.dtype == torch.int64
    for teacher, candidates in zip(routing.teacher_index.tolist(), expected.candidates, strict=True):
        assert candidates[teacher] if candidates.any() else teacher == -1


def test_the_routing_table_of_the_paper() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    group_ids = torch.tensor([8, 8, 2, 2, 5, 5])
    feedback = torch.tensor([False, False, False, True, False, False])
    routing = route_samples(rewards, group_ids)
    # Correct; failed beside a correct one; failed among failed ones; the same; failed; correct.
    assert routing.sdpo_mask.tolist() == [False, True, False, False, True, False]
    assert routing.teacher_index.tolist() == [-1, 0, -1, -1, 5, -1]
    routing = route_samples(rewards, group_ids, feedback_available=feedback)
    assert routing.sdpo_mask.tolist() == [False, True, False, True, True, False]
    assert routing.teacher_index.tolist() == [-1, 0, -1, -1, 5, -1]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float64])
def test_rewards_of_any_dtype(dtype: torch.dtype) -> None:
    rewards, group_ids = torch.tensor([1, 0, 0]).to(dtype), torch.tensor([1, 1, 1], dtype=torch.int32)
    assert route_samples(rewards, group_ids).sdpo_mask.tolist() == [False, True, True]
    advantages = group_advantages(rewards, group_ids)
    assert advantages.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(advantages.float(), torch.tensor([2 / 3, -1 / 3, -1 / 3]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_reward_equal_to_the_threshold_is_correct_after_rounding(dtype: torch.dtype) -> None:
    assert route_samples(torch.tensor([0.7], dtype=dtype), torch.tensor([0]), 0.7).correct.item()


def test_teachers_are_drawn_uniformly_among_the_other_correct_rollouts() -> None:
    groups = 4000
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0]).repeat(groups)
    group_ids = torch.arange(groups).repeat_interleave(6)
    shuffle = torch.randperm(len(rewards))
    routing = route_samples(rewards[shuffle], group_ids[shuffle])
    teacher = torch.empty_like(shuffle).scatter(0, shuffle, shuffle[routing.teacher_index]).view(groups, 6) % 6
    for student in range(6):
        siblings = [index for index in (0, 2, 3, 5) if index != student]
        counts = teacher[:, student].bincount(minlength=6).tolist()
        assert sum(counts[index] for index in siblings) == groups
        # Five standard deviations of a binomial count.
        share = groups / len(siblings)
        assert all(abs(counts[i] - share) < 5 * math.sqrt(share) for i in siblings)


def test_the_generator_decides_the_teachers() -> None:
    rewards, group_ids = torch.ones(64), torch.zeros(64, dtype=torch.int64)

    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return route_samples(rewards, group_ids, generator=generator).teacher_index.tolist()

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@given(rollouts(), st.sampled_from(ADVANTAGE_SCALES))
def test_advantages_agree_with_the_reference(batch: tuple[Tensor, Tensor], scale: Any) -> None:
    rewards, group_ids = batch
    advantages = group_advantages(rewards, group_ids, scale)
    expected = reference.group_advantages(rewards.double(), group_ids, scale)
    torch.testing.assert_close(advantages, expected.to(advantages.dtype), rtol=1e-6, atol=1e-7)


# Three times 0.1 in fp64 is not 0.3.
@example(0.1, 3, "group")
@given(st.floats(-1e30, 1e30), st.integers(1, 40), st.sampled_from(ADVANTAGE_SCALES))
def test_equal_rewards_have_advantage_exactly_zero(reward: float, size: int, scale: Any) -> None:
    rewards = torch.full((size + 1,), reward, dtype=torch.float64)
    rewards[-1] = 0.0
    group_ids = torch.tensor([4] * size + [9])
    for dtype in (torch.float32, torch.float64):
        assert not group_advantages(rewards.to(dtype), group_ids, scale).any()


def test_a_batch_of_one_has_advantage_zero() -> None:
    for scale in ADVANTAGE_SCALES:
        assert group_advantages(torch.tensor([3.0]), torch.tensor([0]), scale).tolist() == [0.0]


def test_standard_deviations_are_unbiased() -> None:
    rewards, group_ids = torch.tensor([0.0, 1.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1])
    by_group = group_advantages(rewards, group_ids, "group", eps=1e-9)
    torch.testing.assert_close(by_group, torch.tensor([-0.5, 0.5, 0.0, 0.0]) / math.sqrt(0.5))
    by_batch = group_advantages(rewards, group_ids, "batch", eps=1e-9)
    torch.testing.assert_close(by_batch, torch.tensor([-0.5, 0.5, 0.0, 0.0]) / rewards.std())


def test_advantages_carry_no_gradient() -> None:
    assert not group_advantages(torch.rand(4, requires_grad=True), torch.zeros(4).long()).requires_grad


REWARDS, IDS = torch.tensor([0.0, 1.0]), torch.tensor([0, 0])


@pytest.mark.parametrize("function", [route_samples, group_advantages])
@pytest.mark.parametrize(
    ("rewards", "group_ids", "error", "message"),
    [
        ([0.0, 1.0], IDS, TypeError, r"rewards must be a torch.Tensor, got list"),
        (REWARDS.to(torch.complex64), IDS, TypeError, r"rewards must be .*, got complex64"),
        (REWARDS[None], IDS, ValueError, r"rewards must have shape \[B\], got \[1, 2\]"),
        (torch.tensor([0.0, math.nan]), IDS, ValueError, r"rewards must be finite, got \[0.0, nan\]"),
        (torch.tensor([math.inf, 0.0]), IDS, ValueError, r"rewards must be finite, got \[inf, 0.0\]"),
        (REWARDS, [0, 0], TypeError, r"group_ids must be a torch.Tensor, got list"),
        (REWARDS, REWARDS, TypeError, r"group_ids must be int64 .*, got float32"),
        (REWARDS, IDS > 0, TypeError, r"group_ids must be int64 .*, got bool"),
        (REWARDS, IDS[:1], ValueError, r"group_ids must have shape \[2\] .*, got \[1\]"),
        (REWARDS, IDS.to("meta"), ValueError, r"group_ids must be on the device .* cpu, got meta"),
    ],
)
def test_bad_rollouts_are_refused(
    function: Any, rewards: Any, group_ids: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        function(rewards, group_ids)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"success_threshold": math.nan}, ValueError, r"success_threshold must be a finite number"),
        ({"success_threshold": "0.5"}, TypeError, r"success_threshold must be a number"),
        ({"feedback_available": [True, True]}, TypeError, r"feedback_available must be a torch.Tensor"),
        ({"feedback_available": IDS}, TypeError, r"feedback_available must be bool, got int64"),
        ({"feedback_available": IDS[:1] > 0}, ValueError, r"feedback_available must have shape \[2\]"),
    ],
)
def test_bad_routing_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        route_samples(REWARDS, IDS, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": "std"}, ValueError, r"scale must be one of \('none', 'group', 'batch'\), got 'std'"),
        ({"eps": 0.0}, ValueError, r"eps must be a finite number > 0, got 0.0"),
        ({"eps": None}, TypeError, r"eps must be a number > 0, got None"),
    ],
)
def test_bad_advantage_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        group_advantages(REWARDS, IDS, **options)
