"""Whom SRPOTrainer takes for a teacher, and what the teacher of a loop with tools or an environment reads."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", "1.16", reason="the trl integration needs trl >= 1.16")

from datasets import Dataset
from trl.experimental.gkd import GKDTrainer
from trl.experimental.sdpo import SDPOConfig

from srpo_kernels.integrations.trl import SRPOTrainerConfig
from tests.integrations.test_trl_solutions import EOS, Told, shown, told, words
from tests.integrations.test_trl_trainer import scored_batch
from tests.tiny_trainer import (
    ScriptedSRPO,
    curve,
    one_correct,
    prompts,
    tiny_model,
    tiny_tokenizer,
    tiny_trainer,
    train,
)


def other_model(**options: Any) -> Any:
    model = tiny_model(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_a_frozen_teacher_is_the_model_at_the_start(tmp_path: Path) -> None:
    start = tiny_model().state_dict()
    trainer = train(ScriptedSRPO, tmp_path, teacher_model_kind="frozen", reward=one_correct)
    for name, value in trainer.teacher.averages().items():
        torch.testing.assert_close(value, start[name], rtol=0.0, atol=0.0)
    assert not torch.equal(trainer.model.lm_head.weight, start["lm_head.weight"])


def test_an_average_is_updated_every_so_often(tmp_path: Path) -> None:
    options = {"teacher_update_rate": 1.0, "teacher_update_every": 2, "max_steps": 3, "reward": one_correct}
    trainer = tiny_trainer(ScriptedSRPO, tmp_path, **options)
    seen: list[torch.Tensor] = []
    trainer.teacher.on_step_begin = lambda *_, **__: seen.append(trainer.teacher.averages()["lm_head.weight"].clone())
    trainer.train()
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("given", ["model", "path"])
def test_distillation_from_another_model_is_gkds(alpha: float, given: str, tmp_path: Path) -> None:
    teacher = other_model()
    options: dict[str, Any] = {"method": "distill", "distillation_alpha": alpha, "temperature": 0.8, "reward": None}
    if given == "path":
        teacher.save_pretrained(tmp_path / "teacher")
        options["teacher_model_name_or_path"] = str(tmp_path / "teacher")
    else:
        options["teacher_model"] = teacher
    trainer = tiny_trainer(ScriptedSRPO, tmp_path, **options)
    batch = scored_batch(trainer)
    assert batch["sdpo_mask"].all()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    length = batch["completion_ids"].shape[1]
    logits = [model(ids, attention_mask=mask).logits[:, -length - 1 : -1] for model in (trainer.model, teacher)]
    labels = batch["completion_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    expected = GKDTrainer.generalized_jsd_loss(*logits, labels, beta=alpha, temperature=0.8)
    loss = trainer._compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    trainer.train()
    trainer._prepare_step([batch])
    assert trainer._compute_loss(trainer.model, batch).item() < expected.item()
    assert curve(trainer, "srpo/sdpo_token_fraction") == [1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_model_kind": "other"}, "teacher_model, or teacher_model_name_or_path, must be given"),
        ({"teacher_model": tiny_model()}, "must be given with teacher_model_kind='other' and only then"),
        (
            {"method": "distill", "teacher_model": tiny_model(vocab_size=48)},
            "must have the vocabulary of model, 47",
        ),
    ],
    ids=str,
)
def test_teachers_that_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_trainer(ScriptedSRPO, tmp_path, **options)


def test_distillation_is_not_of_oneself(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="teacher_model_kind must be 'other' with method='distill'"):
        tiny_trainer(ScriptedSRPO, tmp_path, method="distill", teacher_model_kind="live")


@pytest.mark.parametrize("method", ["srpo", "sdpo"])
def test_a_policy_loss_of_trl_beside_a_divergence(method: str, tmp_path: Path) -> None:
    """Both paths have the same loss where their options are equal."""
    options = {"method": method, "reward": one_correct, "gradient_accumulation_steps": 2, "max_steps": 3}
    plain = train(ScriptedSRPO, tmp_path / "plain", **options)
    # A mask that leaves nothing out.
    masked = train(ScriptedSRPO, tmp_path / "masked", off_policy_mask_threshold=1e6, **options)
    assert curve(masked) == pytest.approx(curve(plain), rel=1e-4, abs=1e-6)
    assert curve(masked, "grad_norm") == pytest.approx(curve(plain, "grad_norm"), rel=1e-4)
    for name in ("srpo/sdpo_token_fraction", "srpo/divergence", "srpo/dw_weight_std"):
        assert curve(masked, name) == pytest.approx(curve(plain, name), rel=1e-4)


FEEDBACK = {"include_feedback": True, "teacher_template": "{prompt} after {solution} {feedback}"}
FEEDBACK |= {"feedback_template": "w39 {feedback}"}


def read(trainer: Any, batch: dict[str, Any]) -> list[str | None]:
    """What comes after the prompt, for the completions that are distilled."""
    texts = [trainer.processing_class.decode(ids) for ids in batch["teacher_prompt_ids"]]
    return [
        text.split(" after ")[1].removesuffix("assistant").strip() if routed else None
        for text, routed in zip(texts, batch["sdpo_mask"].tolist(), strict=True)
    ]


class WithFeedback(Told):
    feedback = (None, "w1 w2", " ")

    def _generate(self, prompts: Any) -> Any:
        generated = list(super()._generate(prompts))
        generated[5] = {"privileged_context": list(self.feedback)}
        return tuple(generated)


def test_feedback_teaches_where_no_sibling_can(tmp_path: Path) -> None:
    completions = [[10, EOS], [11, EOS], [12, EOS]]

    def run(rewards: list[float], **options: Any) -> list[str | None]:
        trainer, batch = told(tmp_path, completions, rewards, trainer=WithFeedback, **(FEEDBACK | options))
        return read(trainer, batch)

    solution = words(10)
    assert run([1.0, 0.0, 0.0]) == [None, f"{solution} w39 w1 w2", solution]
    assert run([1.0, 0.0, 0.0], feedback_only_without_solution=True) == [None, solution, solution]
    # Nobody is correct: the loss of the policy but for the one that was told.
    assert run([0.0, 0.0, 0.0]) == [None, "w39 w1 w2", None]
    assert run([1.0, 0.0, 0.0], include_feedback=False) == [None, solution, solution]
    # Feedback that does not fit leaves the solution.
    assert run([1.0, 0.0, 0.0], max_teacher_length=11) == [None, solution, solution]


def test_nobody_routed_is_said_once(tmp_path: Path) -> None:
    options = {"max_steps": 11, "reward": lambda completion_ids, **_: [0.0] * len(completion_ids)}
    with pytest.warns(
        UserWarning, match="no completion was distilled in 10 generation batches: 0 were correct"
    ) as seen:
        train(ScriptedSRPO, tmp_path, **options)
    assert sum("no completion was distilled" in str(one.message) for one in seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(ScriptedSRPO, tmp_path, reward=one_correct)


def test_a_resume_within_a_generation_batch_continues_the_curve(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "dataset": prompts(8)}
    options |= {"num_iterations": 2, "max_steps": 5, "save_strategy": "steps", "save_steps": 1, "reward": one_correct}
    whole = train(ScriptedSRPO, tmp_path, **options)
    for step in (1, 3):
        resumed = tiny_trainer(ScriptedSRPO, tmp_path, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert curve(resumed) == pytest.approx(curve(whole), rel=1e-5, abs=1e-6)
        assert curve(resumed, "grad_norm") == pytest.approx(curve(whole, "grad_norm"), rel=1e-4)
    # Nothing is left of a generation batch that is done.
    assert not list((tmp_path / "checkpoint-4").glob("srpo_generation_batch*"))


class Counter:
    """An environment that adds to the prompt."""

    def reset(self, **_: Any) -> str:
        return " w30"


def test_prompts_of_an_environment(tmp_path: Path) -> None:
    trainer, _ = told(tmp_path, [[10, EOS], [11, EOS], [12, EOS]], [0.0, 1.0, 0.0])
    # What the constructor sets where the chat template knows of tools.
    trainer.environment_factories, trainer._multi_environment = {None: Counter}, False
    trainer._env_tools, trainer._environment_pool = {None: []}, {None: []}
    batch = trainer._generate_and_score_completions([trainer.train_dataset[0]] * 3)
    assert batch["sdpo_mask"].tolist() == [True, False, True]
    for row in (0, 2):
        text = trainer.processing_class.decode(batch["teacher_prompt_ids"][row])
        assert text.endswith(f" w30 after {words(11)} assistant")


def test_a_rollout_function_has_its_own_prompts_and_masks(tmp_path: Path) -> None:
    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        ids = trainer._tokenize_prompts(prompts)[0]
        completions = [[10, 11, EOS], [12, EOS], [13, EOS]]
        # What an environment said is in nobody's loss.
        env_mask = [[1, 0, 1], [1, 1], [1, 1]]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None, "env_mask": env_mask}

    with pytest.warns(UserWarning, match="rollout_func"):
        trainer, batch = told(
            tmp_path, [[EOS]] * 3, [1.0, 0.0, 0.0], trainer=ScriptedSRPO, rollout_func=rollout, max_steps=1
        )
    assert shown(trainer, batch) == [None, words(10, 11), words(10, 11)]
    trainer._prepare_step([batch])
    assert batch["normalizers"].token_count == 6
    trainer.train()
    assert curve(trainer, "srpo/sdpo_token_fraction") == [pytest.approx(4 / 6)]


def test_the_default_words_are_sdpos(tmp_path: Path) -> None:
    config, theirs = SRPOTrainerConfig(str(tmp_path), use_cpu=True, bf16=False), SDPOConfig
    assert config.teacher_template == theirs.reprompt_template
    assert config.solution_template == theirs.solution_template.replace("successful_previous_attempt", "solution")
    assert config.feedback_template == theirs.feedback_template.replace("feedback_raw", "feedback")


def test_the_teacher_has_the_students_system_prompt_and_switches(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += "{% if thinking %} w38{% endif %}"
    messages = [{"role": "system", "content": "w5"}, {"role": "user", "content": "w6"}]
    options = {"processing_class": tokenizer, "chat_template_kwargs": {"thinking": True}}
    dataset = Dataset.from_dict({"prompt": [messages]})
    _, batch = told(tmp_path, [[10, EOS], [11, EOS]], [1.0, 0.0], dataset=dataset, **options)
    assert tokenizer.decode(batch["teacher_prompt_ids"][1]) == f"system w5 user w6 after {words(10)} assistant w38"
    assert tokenizer.decode(batch["prompt_ids"][1]) == "system w5 user w6 assistant w38"
