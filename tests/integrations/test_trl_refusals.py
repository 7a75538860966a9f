"""The list of what SRPOTrainer refuses, in docs/trainers.md, is what the code refuses."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("trl", "1.16", reason="the trl integration needs trl >= 1.16")

from trl import GRPOConfig

import srpo_kernels.integrations.trl as integration
from srpo_kernels.integrations.trl import tensor_parallel
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


def test_refusals_of_tensor_parallelism(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(ScriptedSRPO, tmp_path)
    monkeypatch.setattr(trainer, "get_tp_size", lambda: 2)
    with pytest.raises(ValueError, match=r"model must be loaded in shards by transformers, .* got one in 1 parts"):
        trainer._share_rows()
    group = SimpleNamespace(size=lambda: 2)
    monkeypatch.setattr(tensor_parallel, "tensor_parallel_group", lambda model: group)
    trainer.args.questions_per_batch = 4
    with pytest.raises(ValueError, match="questions_per_batch must come with a parallelism_config of tp_size=2"):
        trainer._share_rows()
    trainer.eval_dataset, trainer.num_generations_eval = trainer.train_dataset, 5
    with pytest.raises(ValueError, match="per_device_eval_batch_size must give a process whole groups"):
        trainer._share_rows()
    trainer.num_generations = 3
    with pytest.raises(ValueError, match=r"steps_per_generation must give a process whole groups .* got 8 .* of 3"):
        trainer._share_rows()


def test_a_teacher_in_shards_on_other_ranks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration.trainer, "tensor_parallel_group", lambda model: "other")
    monkeypatch.setattr(torch.distributed, "get_process_group_ranks", lambda group: [0, 1])
    with pytest.raises(ValueError, match=r"teacher_model must be whole or .* on the ranks .* None, got \[0, 1\]"):
        tiny_trainer(ScriptedSRPO, tmp_path, teacher_model=tiny_model(), teacher_model_kind="other")


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
