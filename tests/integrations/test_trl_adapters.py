"""Trainable tokens of the LM head in the trainer, whose teacher has their averages. TRL itself refuses LoRA there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", "1.16", reason="the trl integration needs trl >= 1.16")
pytest.importorskip("peft", reason="adapters need peft")

import peft

from tests.tiny_trainer import ScriptedSRPO, curve, train


def test_the_teacher_has_the_averages_of_the_heads_tokens(tmp_path: Path) -> None:
    tokens = {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5, 20]}}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **tokens)
    trainer = train(ScriptedSRPO, tmp_path, peft_config=config, max_steps=3, teacher_update_rate=0.3)
    averages = trainer.teacher.averages()
    assert any("lm_head" in key for key in averages)
    for key, average in averages.items():
        if "lora_A" not in key:
            assert not torch.equal(average, trainer.model.get_parameter(key)), key
    assert all(share > 0.0 for share in curve(trainer, "srpo/sdpo_token_fraction"))
