from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference


def test_failed_rollouts_with_a_correct_sibling_are_distilled() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.4, 0.0, 0.0, 1.0, 1.0, 0.0])
    group_ids = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3])
    routing = reference.route_samples(rewards, group_ids)
    assert routing.correct.tolist() == [True, False, False, False, False, True, True, False]
    assert routing.sdpo_mask.tolist() == [False, True, True, False, False, False, False, False]
    assert routing.candidates[1].nonzero().flatten().tolist() == [0]
    assert routing.candidates[5].nonzero().flatten().tolist() == [6]
    assert not routing.candidates[0].any()


def test_the_threshold_itself_is_correct() -> None:
    routing = reference.route_samples(torch.tensor([0.5, 0.49]), torch.tensor([7, 7]))
    assert routing.correct.tolist() == [True, False]


def test_feedback_makes_a_teacher_for_failed_rollouts_only() -> None:
    feedback = torch.tensor([True, True, False])
    routing = reference.route_samples(
        torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0, 1, 2]), feedback_available=feedback
    )
    assert routing.sdpo_mask.tolist() == [True, False, False]


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 3)), min_size=1, max_size=12))
def test_routing_invariants(samples: list[tuple[float, int]]) -> None:
    rewards = torch.tensor([reward for reward, _ in samples])
    group_ids = torch.tensor([group for _, group in samples])
    routing = reference.route_samples(rewards, group_ids)
    for i, (reward, group) in enumerate(samples):
        siblings = [r for j, (r, g) in enumerate(samples) if g == group and j != i]
        assert routing.sdpo_mask[i] == (reward < 0.5 and any(r >= 0.5 for r in siblings))
        assert not routing.candidates[i, i]


def test_advantages_of_a_group_of_four() -> None:
    rewards, group_ids = torch.tensor([9.0, 1.0, 0.0, 0.0, 0.0]), torch.tensor([5, 3, 3, 3, 3])
    centred = torch.tensor([0.0, 0.75, -0.25, -0.25, -0.25])
    torch.testing.assert_close(reference.group_advantages(rewards, group_ids), centred)
    # The unbiased std of this group is 1/2.
    scaled = reference.group_advantages(rewards, group_ids, scale="group", eps=0.0)
    torch.testing.assert_close(scaled, 2 * centred)


def test_batch_scale_divides_by_the_std_of_all_rewards() -> None:
    rewards, group_ids = torch.tensor([3.0, 1.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 1])
    advantages = reference.group_advantages(rewards, group_ids, scale="batch", eps=0.0)
    torch.testing.assert_close(advantages, torch.tensor([1.0, -1.0, 0.0, 0.0]) / 2**0.5)


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_equal_rewards_have_advantage_exactly_zero(scale: str) -> None:
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.7])
    advantages = reference.group_advantages(rewards, torch.tensor([0, 0, 0, 1]), scale=scale)
    assert advantages.tolist() == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float32])
def test_advantages_are_fp32(dtype: torch.dtype) -> None:
    advantages = reference.group_advantages(torch.tensor([1, 0]).to(dtype), torch.tensor([0, 0]))
    assert advantages.tolist() == [0.5, -0.5]
    assert advantages.dtype == torch.float32
