"""What SRPOTrainer refuses, its preset, its prompts, and heads of transformers models."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", "1.16", reason="the trl integration needs trl >= 1.16")

from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
)
from trl import GRPOConfig

import srpo_kernels as sk
from srpo_kernels.integrations.transformers.solutions import teacher_prompt
from srpo_kernels.integrations.trl import SRPOTrainer, SRPOTrainerConfig
from tests.tiny_trainer import ScriptedSRPO, curve, graded, prompts, tiny_model, tiny_tokenizer, tiny_trainer, train

REFUSED: dict[str, tuple[Any, dict[str, Any]]] = {
    "importance_sampling_level": ("sequence", {"loss_type": "reinforce"}),
    "dual_clip": (3.0, {"top_entropy_quantile": 0.5}),
    "loss_type": ("reinforce", {"off_policy_mask_threshold": 0.5}),
    "sapo_temperature_pos": (0.0, {"loss_type": "sapo"}),
    "beta": (0.1, {"method": "sdpo"}),
    "entropy_coef": (0.1, {"method": "distill"}),
    "use_adaptive_entropy": (True, {"method": "sdpo"}),
    "questions_per_batch": (3, {"per_device_train_batch_size": 32}),
    "method": ("ppo", {}),
    "teacher_model_kind": ("base", {}),
    "teacher_update_rate": (0.0, {}),
    "teacher_update_every": (0, {}),
    "teacher_template": ("{prompt} {answer}", {}),
    "solution_template": ("{prompt}", {}),
    "feedback_template": ("{solution}", {}),
    "token_denominator": ("batch", {}),
    "distillation_alpha": (1.5, {}),
    "distillation_mode": ("full_logits", {}),
    "dw_beta": (-1.0, {}),
    "temperature": (0.0, {}),
}


def config(**options: Any) -> SRPOTrainerConfig:
    return SRPOTrainerConfig(**({"output_dir": "unused", "use_cpu": True, "bf16": False} | options))


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_loss_cannot_do_is_refused_by_name(name: str) -> None:
    value, others = REFUSED[name]
    # The library names its own option.
    match = {"distillation_alpha": "alpha", "sapo_temperature_pos": "tau_positive"}.get(name, name)
    with pytest.raises(ValueError, match=match):
        config(**({name: value} | others))


def test_a_registered_loss_trains(tmp_path: Path) -> None:
    sk.register_policy_loss("mine", lambda rows: -rows.advantages * rows.log_ratio.exp())
    try:
        trainer = tiny_trainer(ScriptedSRPO, tmp_path, loss_type="mine")
        loss = trainer.args.loss_config()
        assert (loss.loss_type, loss.reduction) == ("mine", "token")
        trainer.train()
    finally:
        del sk.POLICY_LOSSES["mine"]
    with pytest.raises(ValueError, match=r"loss_type must be one of .*'bnpo'.*'reinforce'.*got 'mine'"):
        config(loss_type="mine")


def test_the_default_bound_is_none_for_cispo() -> None:
    with pytest.warns(UserWarning, match="epsilon_high is the bound of the ratio itself with loss_type='cispo'"):
        config(loss_type="cispo")


@pytest.mark.parametrize("template", ["no field", "{prompt}", "{solution}", "{prompt} {solution} {", "{prompt} {}"])
def test_a_template_must_have_both_fields(template: str) -> None:
    with pytest.raises(ValueError, match="teacher_template must have the fields"):
        config(teacher_template=template)


def test_a_config_of_trl_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="args must be an SRPOTrainerConfig, got GRPOConfig"):
        SRPOTrainer(tiny_model(), graded, GRPOConfig(str(tmp_path), use_cpu=True, bf16=False), prompts())


def test_the_defaults_are_the_papers() -> None:
    preset = config(questions_per_batch=32, per_device_train_batch_size=4)
    assert preset.learning_rate == 5e-6
    assert preset.num_generations == 8
    assert preset.gradient_accumulation_steps * 4 == 32 * 8
    assert preset.generation_batch_size == 32 * 8
    assert (preset.method, preset.success_threshold, preset.scale_rewards) == ("srpo", 0.5, "none")
    assert (preset.teacher_model_kind, preset.teacher_update_rate) == ("ema", 0.05)
    loss = preset.loss_config()
    assert (loss.epsilon_low, loss.epsilon_high, loss.divergence, loss.alpha) == (0.2, 0.28, "jsd", 0.5)
    assert (loss.distillation_is_clip, loss.dw_beta, loss.reduction, loss.loss_type) == (2.0, 1.0, "token", "grpo")
    with pytest.raises(ValueError, match="questions_per_batch sets gradient_accumulation_steps"):
        config(questions_per_batch=32, gradient_accumulation_steps=2)


def test_every_option_of_the_loss_is_set_or_left_alone_on_purpose() -> None:
    changed = config(
        epsilon=0.1,
        epsilon_high=None,
        delta=3.0,
        dual_clip=4.0,
        beta=0.1,
        distillation_alpha=0.0,
        distillation_mode="topk",
        distillation_topk=7,
        distillation_add_tail=False,
        distillation_is_clip=None,
        dw_beta=0.5,
        temperature=0.7,
        loss_type="dr_grpo",
        importance_sampling_level="sequence",
    ).loss_config(sk.LogitTransform(1.0, 2.0, 30.0))
    default = config().loss_config()
    same = {f.name for f in dataclasses.fields(default) if getattr(changed, f.name) == getattr(default, f.name)}
    # The others are not options of TRL, or were not set: those of the loss are sapo's alone.
    assert same == {
        "loss_options", "kl_type", "log_ratio_clamp", "count_inactive", "count_entropy", "entropy_coef", "topk_of",
        "rollout_correction", "divergence_clip", "teacher_transform",
    }  # fmt: skip
    sapo = config(loss_type="sapo", sapo_temperature_pos=2.0).loss_config()
    assert dict(sapo.loss_options) == {"tau_positive": 2.0, "tau_negative": 1.05}


def test_the_teacher_reads_the_solution_in_the_last_user_message() -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "{x}"}]
    shown = teacher_prompt(chat, "{prompt}|{solution}", solution="{prompt}")
    assert shown == [{"role": "system", "content": "s"}, {"role": "user", "content": "{x}|{prompt}"}]
    assert chat[1]["content"] == "{x}"
    assert teacher_prompt("p", "{{{prompt}}} {solution}", solution="s") == "{p} s"


def test_the_teacher_reads_in_any_conversation() -> None:
    def shown(*messages: dict[str, Any]) -> list[Any]:
        return [message["content"] for message in teacher_prompt(list(messages), "{prompt}|{solution}", solution="s")]

    system, user = {"role": "system", "content": "y"}, {"role": "user", "content": "u"}
    assistant = {"role": "assistant", "content": "a"}
    # A prefill, several turns, a system message at the end or alone.
    assert shown(system, user, assistant) == ["y", "u|s", "a"]
    assert shown(user, assistant, user) == ["u", "a", "u|s"]
    assert shown(user, system) == ["u|s", "y"]
    assert shown(system) == ["y|s"]
    assert shown({"role": "assistant", "content": None}) == ["|s"]
    text, image = {"type": "text", "text": "t"}, {"type": "image"}
    blocks = [image, text, {"type": "text", "text": "v"}]
    assert shown({"role": "user", "content": blocks}) == [[image, {"type": "text", "text": "t\nv|s"}]]
    assert shown({"role": "user", "content": [image]}) == [[image, {"type": "text", "text": "|s"}]]
    assert blocks == [image, text, {"type": "text", "text": "v"}]


SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "pad_token_id": 0}


def test_the_forward_without_the_loss_is_what_it_was(tmp_path: Path) -> None:
    trainer = tiny_trainer(ScriptedSRPO, tmp_path)
    ids = torch.tensor([tiny_tokenizer()("w1 w2 w3")["input_ids"]])
    assert torch.equal(trainer.model(ids).logits, tiny_model()(ids).logits)


def test_a_transform_of_the_logits_is_in_the_loss(tmp_path: Path) -> None:
    sizes = SIZES | {"vocab_size": 47}
    model = AutoModelForCausalLM.from_config(
        Gemma2Config(**sizes, **HEADS, eos_token_id=1, final_logit_softcapping=0.5)
    )
    trainer = tiny_trainer(ScriptedSRPO, tmp_path, model=model)
    assert trainer.loss_config.softcap == 0.5
    trainer.train()


def test_a_model_that_is_compiled_as_a_whole_trains_alike(tmp_path: Path) -> None:
    plain, compiled = (train(ScriptedSRPO, tmp_path / str(on), torch_compile=on) for on in (False, True))
    assert isinstance(compiled.model_wrapped, torch._dynamo.OptimizedModule)
    assert curve(compiled) == pytest.approx(curve(plain), rel=1e-6)
