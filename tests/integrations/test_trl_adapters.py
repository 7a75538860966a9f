"""Adapters on the LM head in the trainer: it trains as TRL's does, and its teacher has the adapters' averages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", "1.16", reason="the trl integration needs trl >= 1.16")
pytest.importorskip("peft", reason="adapters need peft")

import peft

from tests.tiny_trainer import ScriptedGRPO, ScriptedSRPO, curve, train

# TRL itself refuses LoRA on the head.
ADAPTERS: dict[str, dict[str, Any]] = {
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5, 20]}},
}


def test_a_head_that_is_saved_whole_trains_as_trls(tmp_path: Path) -> None:
    shared = {"max_steps": 3, "scale_rewards": "none", "epsilon_high": 0.28, "beta": 0.5}
    results = []
    for cls, options in ((ScriptedGRPO, {}), (ScriptedSRPO, {"method": "grpo", "use_bias_correction_kl": True})):
        torch.manual_seed(0)
        config = peft.LoraConfig(task_type="CAUSAL_LM", **ADAPTERS["saved"])
        results.append(train(cls, tmp_path, peft_config=config, **shared, **options))
    theirs, ours = results
    assert curve(theirs, "kl")[-1] > 0.0
    for metric in ("loss", "grad_norm", "kl"):
        assert curve(ours, metric) == pytest.approx(curve(theirs, metric), rel=1e-3, abs=1e-5), metric


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_teacher_has_the_averages_of_the_heads_adapters(name: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[name])
    trainer = train(ScriptedSRPO, tmp_path, peft_config=config, max_steps=3, teacher_update_rate=0.3)
    averages = trainer.teacher.averages()
    assert any("lm_head" in key for key in averages)
    for key, average in averages.items():
        if "lora_A" not in key:
            assert not torch.equal(average, trainer.model.get_parameter(key)), key
    assert all(share > 0.0 for share in curve(trainer, "srpo/sdpo_token_fraction"))
