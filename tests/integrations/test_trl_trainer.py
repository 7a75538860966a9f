"""SRPOTrainer by itself: its loss against the oracle, generation, checkpoints, LoRA, evaluation."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", "1.16", reason="the trl integration needs trl >= 1.16")

import reference
from srpo_kernels.integrations.trl import SRPOTrainer
from srpo_kernels.integrations.trl.teacher import FILE_NAME
from tests.tiny_trainer import ScriptedSRPO, curve, graded, prompts, tiny_model, tiny_trainer


def scored_batch(trainer: Any, rows: int = 16) -> dict[str, Any]:
    """A generation batch of the trainer's first prompts, scored, with its teacher and normalizers."""
    trainer.model.train()
    examples = [trainer.train_dataset[index // trainer.num_generations] for index in range(rows)]
    batch: dict[str, Any] = trainer._generate_and_score_completions(examples)
    trainer._prepare_step([batch])
    return batch


def hidden64(model: Any, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    ids = torch.cat([prompt_ids, batch["completion_ids"]], 1)
    mask = torch.cat([prompt_mask, batch["completion_mask"]], 1)
    hidden: torch.Tensor = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    return hidden[:, prompt_ids.shape[1] - 1 : -1]


@pytest.mark.parametrize("options", [{}, {"dw_beta": 0.0, "distillation_alpha": 0.0}, {"distillation_mode": "sampled"}])
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("tools", [False, True])
def test_the_loss_is_the_oracles(options: dict[str, Any], chat: bool, tools: bool, tmp_path: Path) -> None:
    trainer = tiny_trainer(ScriptedSRPO, tmp_path, dataset=prompts(chat=chat), temperature=0.8, **options)
    teacher64 = copy.deepcopy(trainer.model).double()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = scored_batch(trainer)
    lengths = batch["completion_mask"].sum(1).tolist()
    completions = [ids[:length].tolist() for ids, length in zip(batch["completion_ids"], lengths, strict=True)]
    rewards = graded(completions)

    # Who is distilled, and what the teacher reads.
    tokenizer = trainer.processing_class
    for row, reward in enumerate(rewards):
        group = [other for other in range(row // 4 * 4, row // 4 * 4 + 4) if other != row and rewards[other] >= 0.5]
        group = [other for other in group if completions[other][-1] == tokenizer.eos_token_id]
        routed = reward < 0.5 and bool(group)
        assert bool(batch["sdpo_mask"][row]) is routed
        prompt = trainer.train_dataset[row // 4]["prompt"]
        shown = []
        for sibling in group:
            solution = tokenizer.decode(completions[sibling], skip_special_tokens=True)
            text = prompt[0]["content"] if chat else prompt
            solution = trainer.args.solution_template.format(solution=solution)
            text = trainer.args.teacher_template.format(prompt=text, solution=solution, feedback="")
            shown.append(tokenizer(f"user {text} assistant" if chat else text)["input_ids"])
        assert batch["teacher_prompt_ids"][row] in shown if routed else batch["teacher_prompt_ids"][row] == []
    assert 0 < int(batch["sdpo_mask"].sum()) < 16

    if tools:
        # Of the tools' tokens some are in every completion, and one has no others.
        batch["tool_mask"] = (torch.rand(batch["completion_ids"].shape) < 0.6).long()
        batch["tool_mask"][batch["sdpo_mask"].nonzero()[0, 0]] = 0
        trainer._prepare_step([batch])
    student64 = copy.deepcopy(trainer.model).double()
    longest = max(map(len, batch["teacher_prompt_ids"]))
    teacher_ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in batch["teacher_prompt_ids"]])
    advantages = reference.group_advantages(torch.tensor(rewards), torch.arange(16) // 4)
    expected = reference.srpo_loss(
        hidden64(student64, batch["prompt_ids"], batch["prompt_mask"], batch),
        student64.lm_head.weight,
        batch["completion_ids"],
        advantages=advantages.double(),
        mask=(batch["completion_mask"] * batch.get("tool_mask", 1)).bool(),
        sdpo_mask=batch["sdpo_mask"],
        teacher_hidden=hidden64(teacher64, teacher_ids, (teacher_ids != 0).long(), batch),
        teacher_weight=teacher64.lm_head.weight,
        config=trainer.loss_config,
    ).loss
    loss = trainer._compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    for name, parameter in trainer.model.named_parameters():
        gradient = student64.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, gradient.float(), rtol=1e-3, atol=1e-5, msg=name)
    tokens = (batch["completion_mask"] * batch.get("tool_mask", 1)).sum(1)
    distilled = trainer._metrics["train"]["srpo/sdpo_token_fraction"][0]
    assert distilled == pytest.approx((tokens[batch["sdpo_mask"]].sum() / tokens.sum()).item())


def test_it_generates_trains_and_evaluates(tmp_path: Path) -> None:
    def length(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(len(ids) % 2) for ids in completion_ids]

    trainer = tiny_trainer(SRPOTrainer, tmp_path, reward=length, max_steps=3, gradient_checkpointing=True)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert all(map(math.isfinite, curve(trainer)))
    for name in ("srpo/sdpo_token_fraction", "srpo/teacher_entropy", "srpo/dw_weight_std", "completions/mean_length"):
        assert len(curve(trainer, name)) == 3
    assert len(curve(trainer, "step_time")) == 3
    metrics = trainer.evaluate(prompts(2))
    assert math.isfinite(metrics["eval_loss"])
    assert "eval_srpo/sdpo_token_fraction" in trainer.state.log_history[-1]


def test_a_resumed_run_continues_the_curve(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_accumulation_steps": 2,
    }
    whole = tiny_trainer(ScriptedSRPO, tmp_path, teacher_update_rate=0.3, **options)
    whole.train()
    resumed = tiny_trainer(ScriptedSRPO, tmp_path, teacher_update_rate=0.3, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert curve(resumed) == pytest.approx(curve(whole), rel=1e-5, abs=1e-6)
    for name, average in whole.teacher.averages().items():
        torch.testing.assert_close(resumed.teacher.averages()[name], average, msg=name)
        assert not torch.equal(average, whole.model.get_parameter(name))

    whole.save_model(str(tmp_path / "saved"))
    loaded = type(whole.model).from_pretrained(tmp_path / "saved")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, whole.model.get_parameter(name))

    (tmp_path / "checkpoint-2" / FILE_NAME).unlink()
    with pytest.raises(ValueError, match="resume_from_checkpoint must be a checkpoint of SRPOTrainer"):
        tiny_trainer(ScriptedSRPO, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_lora_trains_adapters_and_averages_them_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = tiny_trainer(ScriptedSRPO, tmp_path, peft_config=lora, max_steps=3, beta=0.1)
    base = {name: value.clone() for name, value in trainer.model.named_parameters() if "lora_" not in name}
    trainer.train()
    assert all(map(math.isfinite, curve(trainer)))
    assert set(trainer.teacher.averages()) == {n for n, p in trainer.model.named_parameters() if "lora_" in n}
    for name, value in base.items():
        assert torch.equal(trainer.model.get_parameter(name), value)
    # B is 0 at first; the average has gone a part of the way.
    for name, average in trainer.teacher.averages().items():
        if "lora_B" in name:
            assert 0.0 < average.abs().max() < trainer.model.get_parameter(name).abs().max()


def test_importance_weights_of_the_sampler_reach_the_loss(tmp_path: Path) -> None:
    trainer = tiny_trainer(ScriptedSRPO, tmp_path, method="grpo")
    batch = scored_batch(trainer)
    plain = trainer._compute_loss(trainer.model, dict(batch))
    ratios = torch.rand(16, 1)
    weighted = trainer._compute_loss(trainer.model, batch | {"importance_sampling_ratio": ratios})
    log_probs, mask = batch["advantages"], batch["completion_mask"]
    # On-policy, a token's loss is minus its advantage.
    expected = -(log_probs * ratios[:, 0] * mask.sum(1)).sum() / mask.sum()
    assert weighted.item() == pytest.approx(expected.item(), rel=1e-5)
    assert weighted.item() != pytest.approx(plain.item(), rel=1e-2)


def test_completions_that_nobody_scored_are_not_distilled(tmp_path: Path) -> None:
    def partly(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [None if index % 4 == 1 else float(index % 4 == 0) for index in range(len(completion_ids))]

    trainer = tiny_trainer(ScriptedSRPO, tmp_path, reward=partly)
    batch = scored_batch(trainer)
    assert batch["sdpo_mask"].tolist() == [index % 4 > 1 for index in range(16)]
    assert (batch["advantages"].view(4, 4)[:, 1] == 0).all()


def test_a_batch_that_moves_nothing_has_loss_and_gradients_0(tmp_path: Path) -> None:
    trainer = tiny_trainer(ScriptedSRPO, tmp_path, reward=lambda completion_ids, **_: [0.0] * len(completion_ids))
    trainer.train()
    assert curve(trainer) == [0.0, 0.0]
    assert curve(trainer, "grad_norm") == [0.0, 0.0]
    assert curve(trainer, "srpo/active_fraction") == [0.0, 0.0]


def test_every_completion_masked_is_a_loss_of_0(tmp_path: Path) -> None:
    trainer = tiny_trainer(ScriptedSRPO, tmp_path)
    batch = scored_batch(trainer)
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    trainer._prepare_step([batch])
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


def test_autocast_multiplies_in_its_dtype(tmp_path: Path) -> None:
    wide = tiny_trainer(ScriptedSRPO, tmp_path, max_steps=1)
    narrow = tiny_trainer(ScriptedSRPO, tmp_path, max_steps=1, bf16=True)
    wide.train()
    narrow.train()
    assert curve(narrow) == pytest.approx(curve(wide), abs=0.02)
    assert curve(narrow) != curve(wide)
    assert all(parameter.dtype == torch.float32 for parameter in narrow.model.parameters())


def test_a_model_in_bf16_has_a_teacher_in_fp32(tmp_path: Path) -> None:
    trainer = tiny_trainer(ScriptedSRPO, tmp_path, model=tiny_model().bfloat16())
    trainer.train()
    assert all(map(math.isfinite, curve(trainer)))
    assert all(average.dtype == torch.float32 for average in trainer.teacher.averages().values())
