"""Metrics of SRPOTrainer that have TRL's names have TRL's values, on the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", "1.16", reason="the trl integration needs trl >= 1.16")

from tests.tiny_trainer import (
    ScriptedGRPO,
    ScriptedSRPO,
    curve,
    one_correct,
    prompts,
    saved_model,
    tiny_trainer,
    train,
)

# Options of both configs; ours and TRL's defaults differ in them.
SAME: dict[str, Any] = {"scale_rewards": "none", "use_bias_correction_kl": False, "epsilon": 0.02, "epsilon_high": 0.03}
# A step moves the ratios far enough for every clip; the last group's rewards are equal.
MOVING: dict[str, Any] = {"num_iterations": 3, "max_steps": 3, "learning_rate": 3e-2, "reward": one_correct}
OPTIONS: dict[str, dict[str, Any]] = {
    "dapo": {},
    "dapo, two micro-batches": {"gradient_accumulation_steps": 2},
    "grpo": {"loss_type": "grpo", "gradient_accumulation_steps": 2},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.01, "gradient_accumulation_steps": 2},
    "sapo": {"loss_type": "sapo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "gradient_accumulation_steps": 2},
    "gspo of dapo": {"importance_sampling_level": "sequence"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "gradient_accumulation_steps": 2},
    "a bound below the clip": {"delta": 1.02},
    "reference": {"beta": 0.2, "gradient_accumulation_steps": 2},
    "entropy bonus": {"entropy_coef": 0.01},
    "entropy bonus, reference": {"entropy_coef": 0.01, "beta": 0.1, "loss_type": "cispo", "epsilon_high": 1.5},
    "truncated": {"mask_truncated_completions": True, "gradient_accumulation_steps": 2},
    "truncated gspo": {"mask_truncated_completions": True, "importance_sampling_level": "sequence"},
    "several steps per generation": {"steps_per_generation": 2, "loss_type": "grpo"},
}


@pytest.fixture
def model_path(tmp_path: Path) -> str:
    return saved_model(tmp_path / "model")


def assert_same_metrics(ours: list[dict[str, float]], theirs: list[dict[str, float]], *, has_entropy: bool) -> None:
    for mine, expected in zip(ours, theirs, strict=True):
        missing = expected.keys() - mine.keys()
        assert {name.removeprefix("eval_") for name in missing} == (set() if has_entropy else {"entropy"})
        for name in expected.keys() & mine.keys():
            # What a run measures of its speed differs.
            if any(speed in name for speed in ("_time", "runtime", "per_second")):
                continue
            assert mine[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("name", OPTIONS)
def test_metrics_of_a_policy_loss_are_trls(name: str, model_path: str, tmp_path: Path) -> None:
    options = SAME | MOVING | OPTIONS[name]
    theirs = train(ScriptedGRPO, tmp_path / "theirs", model=model_path, **options)
    ours = train(ScriptedSRPO, tmp_path / "ours", model=model_path, method="grpo", **options)
    # The summary of a run has none.
    histories = [trainer.state.log_history[:-1] for trainer in (ours, theirs)]
    assert_same_metrics(*histories, has_entropy="entropy_coef" in options)
    if name not in ("sapo", "a bound below the clip"):
        clipped = "cispo_clip_ratio" if options.get("loss_type") == "cispo" else "clip_ratio/region_mean"
        assert max(curve(theirs, clipped)) > 0.0
        if clipped != "cispo_clip_ratio":
            assert max(curve(theirs, "clip_ratio/high_max")) > max(curve(theirs, clipped))


class WithTools:
    """Every other token of a completion is a tool's, and every fifth completion is as a whole."""

    def _generate(self, prompts: Any) -> Any:
        generated = list(super()._generate(prompts))  # type: ignore[misc]
        generated[2] = [
            [int(row % 5 > 0 and place % 2) for place in range(len(ids))] for row, ids in enumerate(generated[1])
        ]
        return tuple(generated)


class ToolsGRPO(WithTools, ScriptedGRPO):
    pass


class ToolsSRPO(WithTools, ScriptedSRPO):
    pass


@pytest.mark.parametrize("name", ["dapo", "grpo", "gspo", "reference", "entropy bonus", "cispo", "truncated"])
def test_tokens_of_tools_are_not_in_the_loss(name: str, model_path: str, tmp_path: Path) -> None:
    options = SAME | MOVING | OPTIONS[name]
    theirs = train(ToolsGRPO, tmp_path / "theirs", model=model_path, **options)
    ours = train(ToolsSRPO, tmp_path / "ours", model=model_path, method="grpo", **options)
    histories = [trainer.state.log_history[:-1] for trainer in (ours, theirs)]
    assert_same_metrics(*histories, has_entropy="entropy_coef" in options)
    for parameter, expected in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        # A tenth of a step: where a gradient is all but 0, Adam's first steps are rounding.
        torch.testing.assert_close(parameter, expected, rtol=1e-3, atol=3e-3)


def test_metrics_of_an_evaluation_are_trls(model_path: str, tmp_path: Path) -> None:
    options = SAME | {"beta": 0.2, "entropy_coef": 0.01, "num_iterations": 2, "per_device_eval_batch_size": 8}
    logs = []
    for cls, method in ((ScriptedSRPO, {"method": "grpo"}), (ScriptedGRPO, {})):
        trainer = tiny_trainer(cls, tmp_path / cls.__name__, model=model_path, **options, **method)
        with torch.no_grad():
            trainer.model.lm_head.weight.mul_(1.1)
        trainer.evaluate(prompts(4))
        logs.append(trainer.state.log_history)
    assert logs[1][0]["eval_kl"] > 0.0
    assert_same_metrics(*logs, has_entropy=True)


def test_the_policy_loss_of_the_first_of_several_steps_is_trls(model_path: str, tmp_path: Path) -> None:
    options = SAME | {"entropy_coef": 0.01, "steps_per_generation": 4, "dataset": prompts(8), "model": model_path}
    theirs = train(ScriptedGRPO, tmp_path / "theirs", **options)
    ours = train(ScriptedSRPO, tmp_path / "ours", method="grpo", **options)
    assert curve(ours, "policy_loss")[0] == pytest.approx(curve(theirs, "policy_loss")[0], rel=1e-4)
    # Each divides by another number of tokens.
    assert curve(ours)[0] != pytest.approx(curve(theirs)[0], rel=1e-3)


def test_distilled_tokens_are_not_clipped_but_count(model_path: str, tmp_path: Path) -> None:
    options = SAME | MOVING | {"entropy_coef": 0.01, "beta": 0.1}
    trainer = train(ScriptedSRPO, tmp_path, model=model_path, **options)
    assert curve(trainer, "srpo/sdpo_token_fraction")[0] > 0.1
    for step, entry in enumerate(trainer.state.log_history[:-1]):
        policy = 1.0 - entry["srpo/sdpo_token_fraction"]
        for side in ("low", "high"):
            clipped = entry[f"srpo/clip_{side}_fraction"] * policy
            assert entry[f"clip_ratio/{side}_mean"] == pytest.approx(clipped, abs=1e-6), step
        # Those of the policy branch alone, under a name of ours.
        assert "entropy" not in entry and entry["srpo/entropy"] > 0.0
    assert max(curve(trainer, "clip_ratio/region_mean")) > 0.0
