"""Whole training runs of SRPOTrainer beside TRL's own trainers, on the same completions."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", "1.16", reason="the trl integration needs trl >= 1.16")

from tests.tiny_trainer import (
    ScriptedSDPO,
    ScriptedSRPO,
    curve,
    one_correct,
    saved_model,
    train,
)


@pytest.fixture
def model_path(tmp_path: Path) -> str:
    return saved_model(tmp_path / "model")


def assert_same_run(ours: Any, theirs: Any) -> None:
    assert curve(ours) == pytest.approx(curve(theirs), rel=1e-5, abs=1e-5)
    assert curve(ours, "grad_norm") == pytest.approx(curve(theirs, "grad_norm"), rel=1e-4)
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, theirs.model.get_parameter(name), rtol=1e-3, atol=1e-4, msg=name)


SDPO_OPTIONS: dict[str, dict[str, Any]] = {
    "jsd": {"distillation_alpha": 0.5},
    "forward": {"distillation_alpha": 0.0},
    "reverse": {"distillation_alpha": 1.0},
    "accumulation": {"distillation_alpha": 0.3, "gradient_accumulation_steps": 2},
    "temperature": {"distillation_alpha": 0.5, "temperature": 0.6},
    "live": {"distillation_alpha": 0.5, "teacher_model_kind": "live"},
    "fast teacher": {"distillation_alpha": 0.5, "teacher_update_rate": 0.5},
    "iterations": {"distillation_alpha": 0.5, "num_iterations": 2, "distillation_is_clip": 1.01},
    "topk": {"distillation_alpha": 0.5, "distillation_topk": 5, "distillation_add_tail": True},
    "topk, no tail": {"distillation_alpha": 0.5, "distillation_topk": 5, "distillation_add_tail": False},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "iterations" else pytest.mark.slow) for name in SDPO_OPTIONS]
)
def test_sdpo_trains_as_trl_does(name: str, model_path: str, tmp_path: Path) -> None:
    options = {"model": model_path, "reward": one_correct, "max_steps": 3} | SDPO_OPTIONS[name]
    topk = "distillation_topk" in options
    theirs = train(
        ScriptedSDPO,
        tmp_path / "theirs",
        distillation_mode="topk_logits" if topk else "full_logits",
        reprompt_template="{prompt} {solution}",
        solution_template="after {successful_previous_attempt}",
        **options,
    )
    ours = train(
        ScriptedSRPO,
        tmp_path / "ours",
        method="sdpo",
        # TRL's mean over sequences, with equal weights.
        loss_type="grpo",
        dw_beta=0.0,
        distillation_mode="topk" if topk else "full",
        teacher_template="{prompt} {solution}",
        solution_template="after {solution}",
        **options,
    )
    assert min(curve(ours)) > 0.0
    assert_same_run(ours, theirs)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_the_split_of_a_batch_does_not_matter(loss_type: str, tmp_path: Path) -> None:
    run = functools.partial(train, ScriptedSRPO, loss_type=loss_type, max_steps=3, dw_beta=2.0)
    whole = run(tmp_path / "whole", per_device_train_batch_size=16)
    parts = run(tmp_path / "parts", per_device_train_batch_size=2, gradient_accumulation_steps=8)
    assert 0.0 < curve(whole, "srpo/sdpo_token_fraction")[0] < 1.0
    assert curve(whole, "srpo/dw_weight_mean") == pytest.approx([1.0] * 3, rel=1e-5)
    assert_same_run(parts, whole)
    for metric in (name for name in whole.state.log_history[0] if name.startswith("srpo/")):
        assert curve(parts, metric) == pytest.approx(curve(whole, metric), rel=1e-4, abs=1e-5), metric
