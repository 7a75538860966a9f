"""Groups of equal rewards in SRPOTrainer: advantages of exactly 0, and nobody's forward."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", "1.16", reason="the trl integration needs trl >= 1.16")

from srpo_kernels.integrations.trl.rewards import equal_groups
from tests.tiny_trainer import ScriptedSRPO, curve, prompts, tiny_trainer, train

SCALES = ["none", "group", "batch"]
AGGREGATIONS = ["sum_then_normalize", "normalize_then_sum"]
NONE = math.nan


def scripted(table: list[float | None]) -> Any:
    """A reward function that gives these rewards, over and over."""

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return (table * len(completion_ids))[: len(completion_ids)]

    return reward


def advantages(folder: Path, *tables: list[float | None], **options: Any) -> list[list[float]]:
    """Those of four groups of four."""
    trainer = tiny_trainer(ScriptedSRPO, folder, method="grpo", reward=[*map(scripted, tables)], **options)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([trainer.train_dataset[row // 4] for row in range(16)])
    grouped: list[list[float]] = batch["advantages"].view(4, 4).tolist()
    return grouped


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("reward", [0.2, 1 / 3, -0.7, 1e-8, 123456.7])
def test_equal_rewards_have_advantage_0(reward: float, scale: str, aggregation: str, tmp_path: Path) -> None:
    table: list[float | None] = (
        [reward] * 4 + [reward, reward + 1.0] * 2 + [reward] * 3 + [None] + [None] * 3 + [reward]
    )
    groups = advantages(tmp_path, table, scale_rewards=scale, multi_objective_aggregation=aggregation)
    assert [group == [0.0] * 4 for group in groups] == [True, False, True, True]


@pytest.mark.parametrize("weights", [None, [0.3, 0.7]])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_equal_rewards_of_two_functions(weights: list[float] | None, aggregation: str, tmp_path: Path) -> None:
    first = [0.2] * 4 + [0.1, 0.3, 0.1, 0.3] + [0.2, 0.2, 0.2, 0.7] + [0.2, None, 0.2, 0.2]
    second = [0.7] * 4 + [0.2, 0.0, 0.2, 0.0] + [0.7] * 4 + [0.7, None, 0.7, 0.7]
    options = {"reward_weights": weights, "multi_objective_aggregation": aggregation}
    groups = advantages(tmp_path, first, second, **options)
    # 0.1 + 0.2 is 0.3 + 0.0, which fp32 does not know; weights, or scales, part them.
    assert [group == [0.0] * 4 for group in groups] == [True, weights is None, False, True]


def test_a_difference_is_not_rounding() -> None:
    ones, both = torch.ones(1), torch.ones(2)
    least = torch.tensor([0.2, torch.nextafter(torch.tensor(0.2), torch.tensor(1.0)).item()])[:, None]
    assert not equal_groups(least, ones, 2, "sum_then_normalize").any()
    assert not equal_groups(torch.tensor([[0.2, 1.0], [0.2, 1.000001]]), both, 2, "sum_then_normalize").any()
    # What is the same for all says nothing, however large.
    varied = torch.tensor([[1000.0, 0.0], [1000.0, 1.0]])
    for aggregation in AGGREGATIONS:
        assert not equal_groups(varied, both, 2, aggregation).any()
        # A reward of weight 0 is none.
        assert equal_groups(varied, torch.tensor([1.0, 0.0]), 2, aggregation).all()
    # One function alone scored the first completion, none the last.
    partly = torch.tensor([[0.2, NONE], [0.2, 0.5], [NONE, NONE]])
    assert not equal_groups(partly, both, 3, "sum_then_normalize").any()
    assert equal_groups(partly, both, 3, "normalize_then_sum").all()


@pytest.mark.parametrize("scale", SCALES)
def test_equal_rewards_get_no_forward_and_move_no_weight(scale: str, tmp_path: Path) -> None:
    # The mean of eight times 0.2 is not 0.2 in fp32.
    options = {"num_generations": 8, "gradient_accumulation_steps": 2, "method": "grpo", "scale_rewards": scale}
    active = {}
    for low in (0.0, 0.2):
        table: list[float | None] = [low] * 8 + [low, low + 1.0] * 4
        mixed = train(ScriptedSRPO, tmp_path / f"{low}", reward=scripted(table), **options)
        active[low] = curve(mixed, "srpo/active_fraction")
        assert 0.0 < active[low][0] < 1.0
    assert active[0.2] == active[0.0]

    alone = tiny_trainer(ScriptedSRPO, tmp_path / "equal", reward=scripted([0.2]), **options)
    before = {name: value.clone() for name, value in alone.model.named_parameters()}
    alone.train()
    assert curve(alone, "srpo/active_fraction") == [0.0, 0.0]
    assert all(torch.equal(value, before[name]) for name, value in alone.model.named_parameters())


def test_equal_rewards_of_an_evaluation_with_groups_of_its_own(tmp_path: Path) -> None:
    options = {"num_generations_eval": 2, "per_device_eval_batch_size": 8, "method": "grpo", "scale_rewards": "group"}
    trainer = tiny_trainer(ScriptedSRPO, tmp_path, reward=scripted([0.2, 0.2, 0.7, 0.7]), **options)
    trainer.evaluate(prompts(4))
    assert trainer.state.log_history[0]["eval_srpo/active_fraction"] == 0.0


def test_a_reward_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    for method in ("grpo", "srpo"):
        trainer = tiny_trainer(ScriptedSRPO, tmp_path, reward=scripted([0.0, math.inf]), method=method)
        with pytest.raises(ValueError, match="reward_funcs must return finite rewards or None, got"):
            trainer.train()
