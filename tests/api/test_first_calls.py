"""What a first call gets wrong gets a hint, and values at the edges of their types the right answer or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import srpo_kernels as sk
from tests.inputs import cast, head_inputs, loss_inputs

LOSS = cast(loss_inputs(0, (4, 6), teacher_size=5), torch.float32)
STATS = cast(head_inputs(0, (4, 6), 8, 33, teacher_size=5), torch.float32)
PAIRS = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(("function", "call"), [(sk.srpo_loss, LOSS), (sk.token_stats, STATS)])
def test_logits_for_hidden_states_and_a_transposed_head(function: Callable[..., Any], call: dict[str, Any]) -> None:
    hint = "these are logits in place of hidden, or a transposed weight"
    for changes in ({"hidden": torch.zeros(4, 6, 33)}, {"weight": call["weight"].t(), "bias": None}):
        with pytest.raises(ValueError, match=rf"hidden and weight must agree.*got .*: {hint}"):
            function(**call | changes)
    with pytest.raises(ValueError, match=r"teacher_hidden and .*: these are logits in place of teacher_hidden"):
        function(**call | {"teacher_hidden": torch.zeros(4, 6, 33)})


@pytest.mark.parametrize(("function", "call"), [(sk.srpo_loss, LOSS), (sk.token_stats, STATS)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8], ids=str)
def test_labels_of_ignored_positions(function: Callable[..., Any], call: dict[str, Any], dtype: torch.dtype) -> None:
    labels = call["target_ids"].masked_fill(~call["mask"], -100).to(dtype)
    hint = "-100 at row .*the label of positions to ignore: mask=target_ids != -100 leaves them out"
    with pytest.raises(ValueError, match=hint):
        function(**call | {"target_ids": labels, "mask": None})
    expected = function(**call)[0]
    torch.testing.assert_close(function(**call | {"target_ids": labels, "mask": labels != -100})[0], expected)


# Values at the edges of their types.


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("vocab_size", [256, 1000, 65_536, 70_000])
def test_ids_of_narrow_integers(dtype: torch.dtype, vocab_size: int) -> None:
    ids = torch.tensor([0, 5, 127])
    hidden, weight = torch.randn(3, 2), torch.randn(vocab_size, 2)
    expected = sk.token_stats(hidden, weight, ids)
    assert torch.equal(sk.token_stats(hidden, weight, ids.to(dtype)).log_probs, expected.log_probs)
    loss = [sk.srpo_loss(hidden, weight, x, advantages=torch.ones(3)).loss for x in (ids, ids.to(dtype))]
    assert torch.equal(*loss)
    if dtype != torch.uint8:
        with pytest.raises(ValueError, match=rf"target_ids must lie in \[0, {vocab_size}\).*got -1 at row 1"):
            sk.token_stats(hidden, weight, torch.tensor([0, -1, 127]).to(dtype))


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int64, torch.float64], ids=str
)
@pytest.mark.parametrize("threshold", [300, -1, 0.5, 1, 1e30, 256, 65_537])
def test_rewards_of_any_type_reach_the_threshold_or_do_not(dtype: torch.dtype, threshold: float) -> None:
    rewards = torch.tensor([0, 1, 1, 0])
    correct = sk.route_samples(rewards.to(dtype), PAIRS, threshold).correct
    assert correct.tolist() == [reward >= threshold for reward in rewards.tolist()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_reward_reaches_the_threshold_that_is_written_the_same(dtype: torch.dtype) -> None:
    rewards = torch.tensor([0.7, 0.1, 0.3, 0.0], dtype=dtype)
    for threshold, expected in ((0.7, [True, False, False, False]), (0.1, [True, True, True, False])):
        assert sk.route_samples(rewards, PAIRS, threshold).correct.tolist() == expected


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
@pytest.mark.parametrize("largest", [1.7e308, 3e38])
def test_rewards_that_are_too_far_apart(scale: Any, largest: float) -> None:
    dtype = torch.float64 if largest > 1e300 else torch.float32
    rewards = torch.tensor([largest, -largest, -largest, 0.0], dtype=dtype)
    group_ids = torch.tensor([0, 0, 0, 1])
    if dtype == torch.float32 and scale != "none":
        assert sk.group_advantages(rewards, group_ids, scale).isfinite().all()
        return
    with pytest.raises(ValueError, match="rewards must have differences and squares that float64 holds"):
        sk.group_advantages(rewards, group_ids, scale)
