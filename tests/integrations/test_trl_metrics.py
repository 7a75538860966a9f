"""Metrics of SRPOTrainer that have TRL's names have TRL's values, on the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", "1.16", reason="the trl integration needs trl >= 1.16")

from tests.tiny_trainer import (
    ScriptedSRPO,
    curve,
    one_correct,
    prompts,
    saved_model,
    train,
)

# A step moves the ratios far enough for every clip; the last group's rewards are equal.
MOVING: dict[str, Any] = {"num_iterations": 3, "max_steps": 3, "learning_rate": 3e-2, "reward": one_correct}
MOVING |= {"scale_rewards": "none", "use_bias_correction_kl": False, "epsilon": 0.02, "epsilon_high": 0.03}


@pytest.fixture
def model_path(tmp_path: Path) -> str:
    return saved_model(tmp_path / "model")


def test_a_step_of_several_divides_by_its_own_tokens(model_path: str, tmp_path: Path) -> None:
    options = {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "dataset": prompts(8), "model": model_path}
    options |= {"method": "grpo", "reward": one_correct, "max_steps": 4}
    runs = [
        train(ScriptedSRPO, tmp_path / name, token_denominator=name, **options) for name in ("step", "generation_batch")
    ]
    exact, theirs = (curve(run) for run in runs)
    assert exact != pytest.approx(theirs, rel=1e-3)
    assert exact == pytest.approx(theirs, rel=0.5)


def test_entropies_can_be_left_out(model_path: str, tmp_path: Path) -> None:
    options = MOVING | {"model": model_path, "method": "grpo"}
    runs = [train(ScriptedSRPO, tmp_path / str(on), log_entropy=on, **options) for on in (True, False)]
    assert curve(runs[0]) == pytest.approx(curve(runs[1]), rel=1e-5, abs=1e-6)
    assert len(curve(runs[0], "entropy")) == 3 and not curve(runs[1], "entropy")
    assert not curve(runs[1], "srpo/entropy")


def test_distilled_tokens_are_not_clipped_but_count(model_path: str, tmp_path: Path) -> None:
    options = MOVING | {"entropy_coef": 0.01, "beta": 0.1}
    trainer = train(ScriptedSRPO, tmp_path, model=model_path, **options)
    assert curve(trainer, "srpo/sdpo_token_fraction")[0] > 0.1
    for step, entry in enumerate(trainer.state.log_history[:-1]):
        policy = 1.0 - entry["srpo/sdpo_token_fraction"]
        for side in ("low", "high"):
            clipped = entry[f"srpo/clip_{side}_fraction"] * policy
            assert entry[f"clip_ratio/{side}_mean"] == pytest.approx(clipped, abs=1e-6), step
        # Both are of the policy branch, whose every token is scored here.
        assert entry["entropy"] == pytest.approx(entry["srpo/entropy"])
    assert max(curve(trainer, "clip_ratio/region_mean")) > 0.0
