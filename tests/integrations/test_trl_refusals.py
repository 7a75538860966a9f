"""The list of what SRPOTrainer refuses, in docs/trainers.md, is what the code refuses."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl", "1.16", reason="the trl integration needs trl >= 1.16")

from accelerate import ParallelismConfig
from trl import GRPOConfig

import srpo_kernels.integrations.trl as integration
from srpo_kernels.integrations.trl import SRPOTrainer
from tests.integrations.test_trl_options import config
from tests.tiny_models import tiny_model_of
from tests.tiny_trainer import ScriptedSRPO, tiny_model, tiny_trainer, train

DOCUMENT = (Path(__file__).parents[2] / "docs/trainers.md").read_text()
ROWS = re.findall(r"^\| (`.*?) \|", DOCUMENT.split("## What SRPOTrainer refuses")[1], re.MULTILINE)
LISTED = {name for row in ROWS for name in re.findall(r"`(\w+)`", row)}
# What its constructor takes, and what is not an option of its own.
OF_THE_TRAINER = {"model", "reward_funcs"}


REFUSALS: dict[str, Any] = {
    "loss_type": lambda folder: config(loss_type="other"),
    "importance_sampling_level": lambda folder: config(importance_sampling_level="sequence", loss_type="reinforce"),
    "beta": lambda folder: config(beta=0.1, method="sdpo"),
    "entropy_coef": lambda folder: config(entropy_coef=0.1, method="distill"),
    "use_adaptive_entropy": lambda folder: config(use_adaptive_entropy=True, method="sdpo"),
    "gradient_accumulation_steps": lambda folder: config(gradient_accumulation_steps=2, questions_per_batch=32),
    "parallelism_config": lambda folder: config(parallelism_config=ParallelismConfig(tp_size=2)),
    "model": lambda folder: tiny_trainer(ScriptedSRPO, folder, model=tiny_model_of("bert", vocab_size=47)),
    "reward_funcs": lambda folder: train(
        ScriptedSRPO, folder, reward=lambda completion_ids, **_: [float("inf")] * len(completion_ids)
    ),
}


def test_the_list_has_a_case_for_each() -> None:
    assert set(REFUSALS) == LISTED


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_listed_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"\b{name}\b.* (must|are) "):
        REFUSALS[name](tmp_path)


def test_models_in_shards_of_tensor_parallelism_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model._tp_size = 2
    with pytest.raises(ValueError, match="model must be without tensor parallelism with SRPOTrainer, got tp_size=2"):
        SRPOTrainer._refuse_models(SimpleNamespace(_is_vlm=False, args=config(), model=model))
    with pytest.raises(ValueError, match="teacher_model must be without tensor parallelism"):
        tiny_trainer(ScriptedSRPO, tmp_path, teacher_model=model, teacher_model_kind="other")


def test_what_is_refused_is_listed() -> None:
    options = {field.name for field in dataclasses.fields(GRPOConfig)} | OF_THE_TRAINER
    refused = set()
    for path in Path(integration.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                text = ast.unparse(node.exc.args[0])
                # What a message begins with is what it refuses.
                refused |= set(re.findall(r"\w+", text.split(" must ")[0].split(" are terms ")[0])) & options
    # A product that has to divide, and a checkpoint of another trainer.
    assert refused <= LISTED | {"num_generations", "resume_from_checkpoint"}
    assert {"beta", "gradient_accumulation_steps"} <= refused
