"""GRPO in SRPOTrainer beside TRL's GRPOTrainer, option by option: loss, gradient norm, weights and metrics of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", "1.16", reason="the trl integration needs trl >= 1.16")

from transformers import AutoModelForCausalLM, MixtralConfig

from tests.tiny_trainer import (
    ScriptedGRPO,
    ScriptedSRPO,
    curve,
    one_correct,
    prompts,
    saved_model,
    tiny_tokenizer,
    tiny_trainer,
    train,
)

# Of both configs, whose defaults differ in the first three.
SAME: dict[str, Any] = {"scale_rewards": "none", "use_bias_correction_kl": False, "epsilon_high": 0.03, "epsilon": 0.02}
# A step moves the ratios far enough for every clip; the last group's rewards are equal.
SAME |= {"num_iterations": 3, "max_steps": 3, "learning_rate": 3e-2, "reward": one_correct}
# The last step of an epoch, and a generation batch of several.
SEVERAL = {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "dataset": prompts(8), "max_steps": 4}
# An epoch of four micro-batches, and steps of three.
SHORT = {"steps_per_generation": 2, "gradient_accumulation_steps": 3, "dataset": prompts(8), "num_iterations": 1}
OPTIONS: dict[str, dict[str, Any]] = {
    "dapo": {},
    "dapo, two micro-batches": {"gradient_accumulation_steps": 2},
    "dapo, TRL's denominator": {**SEVERAL, "num_iterations": 2},
    "dapo, a step of two generation batches": {"steps_per_generation": 1, "gradient_accumulation_steps": 2},
    "dapo, a last step of one micro-batch": SHORT,
    "grpo, a last step of one micro-batch": SHORT | {"loss_type": "grpo"},
    "top entropy, a last step of one micro-batch": SHORT | {"top_entropy_quantile": 0.5},
    "grpo": {"loss_type": "grpo", "gradient_accumulation_steps": 2},
    "dr_grpo": {"loss_type": "dr_grpo", "gradient_accumulation_steps": 2},
    "bnpo": {"loss_type": "bnpo", "gradient_accumulation_steps": 2},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.01, "gradient_accumulation_steps": 2},
    "cispo, bound below 1": {"loss_type": "cispo", "epsilon_high": 0.9},
    "cispo of sequences": {"loss_type": "cispo", "epsilon_high": 1.01, "importance_sampling_level": "sequence"},
    "sapo": {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.5},
    "sapo of sequences": {"loss_type": "sapo", "importance_sampling_level": "sequence"},
    "vespo": {"loss_type": "vespo", "vespo_k_pos": 1.5},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "gradient_accumulation_steps": 2},
    "gspo of dapo": {"importance_sampling_level": "sequence"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "gradient_accumulation_steps": 2},
    "luspo of tokens": {"loss_type": "luspo", "beta": 0.1},
    "delta": {"delta": 1.02},
    "reference": {"beta": 0.2, "gradient_accumulation_steps": 2},
    "weighted reference": {"beta": 0.2, "use_bias_correction_kl": True},
    "weighted reference of sequences": {
        "beta": 0.2,
        "use_bias_correction_kl": True,
        "importance_sampling_level": "sequence",
        "loss_type": "luspo",
    },
    "entropy bonus": {"entropy_coef": 0.01},
    "entropy bonus, reference": {"entropy_coef": 0.01, "beta": 0.1, "loss_type": "cispo", "epsilon_high": 1.5},
    "entropy bonus of bnpo": {"entropy_coef": 0.01, "loss_type": "bnpo", "gradient_accumulation_steps": 2},
    "entropy bonus of sequences": {"entropy_coef": 0.01, "loss_type": "grpo", "gradient_accumulation_steps": 2},
    "adaptive entropy": {"use_adaptive_entropy": True, "entropy_target": 3.0, "gradient_accumulation_steps": 2},
    "top entropy": {"top_entropy_quantile": 0.5, "gradient_accumulation_steps": 2, "entropy_coef": 0.01},
    "off-policy mask": {"off_policy_mask_threshold": 0.01, "loss_type": "grpo"},
    "truncated": {"mask_truncated_completions": True, "gradient_accumulation_steps": 2},
    "truncated gspo": {"mask_truncated_completions": True, "importance_sampling_level": "sequence"},
    "group scale": {"scale_rewards": "group"},
    "temperature": {"temperature": 0.6},
    "padding": {"pad_to_multiple_of": 8},
    "fp32 head": {"cast_lm_head_to_fp32": True},
    "checkpointing": {"gradient_checkpointing": True},
}
QUICK = {
    "dapo, TRL's denominator",
    "dapo, a last step of one micro-batch",
    "bnpo",
    "gspo",
    "weighted reference",
    "top entropy",
    "vespo",
    "entropy bonus",
}
SWEEP = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in OPTIONS]


@pytest.fixture
def model_path(tmp_path: Path) -> str:
    return saved_model(tmp_path / "model")


def both(folder: Path, classes: tuple[Any, Any] = (ScriptedGRPO, ScriptedSRPO), **options: Any) -> tuple[Any, Any]:
    """TRL's trainer and ours, after the same run."""
    own = {"token_denominator": "generation_batch"} if "steps_per_generation" in options else {}
    theirs = train(classes[0], folder / "theirs", **(SAME | options))
    return theirs, train(classes[1], folder / "ours", method="grpo", **(SAME | options), **own)


def assert_same_run(theirs: Any, ours: Any, *, atol: float = 3e-3) -> None:
    """The summary of a run has none of the metrics."""
    for expected, mine in zip(theirs.state.log_history[:-1], ours.state.log_history[:-1], strict=True):
        assert expected.keys() <= mine.keys()
        for name in expected.keys() - {"step_time"}:
            assert mine[name] == pytest.approx(expected[name], rel=2e-4, abs=1e-5), name
    for name, parameter in ours.model.named_parameters():
        # A tenth of a step: where a gradient is all but 0, Adam's first steps are rounding.
        torch.testing.assert_close(parameter, theirs.model.get_parameter(name), rtol=1e-3, atol=atol, msg=name)


@pytest.mark.parametrize("name", SWEEP)
def test_grpo_is_trls(name: str, model_path: str, tmp_path: Path) -> None:
    theirs, ours = both(tmp_path, model=model_path, **OPTIONS[name])
    assert_same_run(theirs, ours)
    assert len(curve(ours, "step_time")) == ours.state.global_step == ours.args.max_steps
    if name in ("dapo", "gspo", "grpo"):
        assert max(curve(theirs, "clip_ratio/high_max")) > max(curve(theirs, "clip_ratio/region_mean")) > 0.0


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


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "grpo" else pytest.mark.slow)
             for name in ("dapo", "grpo", "bnpo", "gspo", "luspo", "reference", "cispo", "truncated", "top entropy")],
)  # fmt: skip
def test_tokens_of_tools_are_not_in_the_loss(name: str, model_path: str, tmp_path: Path) -> None:
    assert_same_run(*both(tmp_path, (ToolsGRPO, ToolsSRPO), model=model_path, **OPTIONS[name]))


class TokenAdvantages:
    """A later token of a completion has less of its advantage, and the second one none."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        steps = torch.arange(output["completion_ids"].shape[1])
        output["advantages"] = output["advantages"][:, None] * 0.9**steps * (steps != 1)
        return output


class TokenAdvantagesGRPO(TokenAdvantages, ScriptedGRPO):
    pass


class TokenAdvantagesSRPO(TokenAdvantages, ScriptedSRPO):
    pass


@pytest.mark.parametrize("name", ["dapo", pytest.param("gspo", marks=pytest.mark.slow)])
def test_advantages_of_tokens(name: str, model_path: str, tmp_path: Path) -> None:
    classes = (TokenAdvantagesGRPO, TokenAdvantagesSRPO)
    assert_same_run(*both(tmp_path, classes, model=model_path, **OPTIONS[name]))


class OwnLogProbs:
    """A subclass with log-probs of its own."""

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        log_probs, *others = super()._get_per_token_logps_and_entropies(*args, **kwargs)  # type: ignore[misc]
        return (1.1 * log_probs, *others)


class OwnGRPO(OwnLogProbs, ScriptedGRPO):
    pass


class OwnSRPO(OwnLogProbs, ScriptedSRPO):
    pass


def test_log_probs_of_a_subclass_are_those_of_the_loss(model_path: str, tmp_path: Path) -> None:
    assert_same_run(*both(tmp_path, (OwnGRPO, OwnSRPO), model=model_path))


def test_log_probs_of_a_subclass_have_one_kl_where_nobody_is_distilled(model_path: str, tmp_path: Path) -> None:
    options = SAME | {"model": model_path, "beta": 0.2, "entropy_coef": 0.01}
    alone = train(OwnSRPO, tmp_path / "grpo", method="grpo", **options)
    beside = train(OwnSRPO, tmp_path / "srpo", success_threshold=2.0, **options)
    assert curve(beside) == pytest.approx(curve(alone), rel=1e-6)
    assert curve(alone, "kl")[1] > 0.0


def saved_experts(folder: Path) -> str:
    torch.manual_seed(0)
    sizes = {"vocab_size": 47, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 1}
    config = MixtralConfig(**sizes, **heads, pad_token_id=0, eos_token_id=1, router_jitter_noise=0.0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "options",
    [
        {"router_aux_loss_coef": 0.5, "gradient_accumulation_steps": 2},
        pytest.param({"router_aux_loss_coef": 0.5, "top_entropy_quantile": 0.5}, marks=pytest.mark.slow),
        pytest.param({"beta": 0.1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_experts_have_their_auxiliary_loss(options: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = both(tmp_path, model=saved_experts(tmp_path / "model"), **options)
    assert_same_run(theirs, ours)
    assert all(value > 0.5 for value in curve(ours, "aux_loss"))


def test_metrics_of_an_evaluation_are_trls(model_path: str, tmp_path: Path) -> None:
    options = SAME | {"beta": 0.2, "entropy_coef": 0.01, "num_iterations": 2, "per_device_eval_batch_size": 8}
    logs = []
    for cls, method in ((ScriptedSRPO, {"method": "grpo"}), (ScriptedGRPO, {})):
        trainer = tiny_trainer(cls, tmp_path / cls.__name__, model=model_path, **options, **method)
        with torch.no_grad():
            trainer.model.lm_head.weight.mul_(1.1)
        trainer.evaluate(prompts(4))
        logs.append(trainer.state.log_history[0])
    assert logs[1]["eval_kl"] > 0.0
    for name in logs[1]:
        if not any(speed in name for speed in ("_time", "runtime", "per_second")):
            assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-4, abs=1e-5), name


# What bf16 rounds: TRL's logits of up to 2**3, by up to 2**-6, and so a log-prob; a gradient by a few percent.
IN_BF16 = ("dapo", "bnpo", "gspo", "luspo of tokens", "cispo", "sapo", "vespo", "reference", "entropy bonus")
IN_BF16 += ("weighted reference of sequences", "top entropy", "adaptive entropy")


@pytest.mark.parametrize("kind", ["bf16", pytest.param("autocast", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "reference" else pytest.mark.slow) for name in IN_BF16]
)
def test_grpo_is_trls_in_bf16(name: str, kind: str, tmp_path: Path) -> None:
    """A token at the edge of a clip, or of a quantile, may be held in one run and not in the other."""
    dtype = "bfloat16" if kind == "bf16" else "float32"
    path = saved_model(tmp_path / "model", getattr(torch, dtype))
    same = {"model": path, "model_init_kwargs": {"dtype": dtype}, "bf16": kind == "autocast", "learning_rate": 1e-3}
    theirs, ours = both(tmp_path, **(OPTIONS[name] | same))
    assert curve(ours) == pytest.approx(curve(theirs), rel=0.05, abs=5e-3)
    # Of the tokens of another quantile there is another gradient.
    steps = slice(1 if name == "top entropy" else None)
    assert curve(ours, "grad_norm")[steps] == pytest.approx(curve(theirs, "grad_norm")[steps], rel=0.1)
    assert curve(ours, "entropy") == pytest.approx(curve(theirs, "entropy"), rel=0.01)
    for metric in ("kl", "clip_ratio/region_mean"):
        assert curve(ours, metric) == pytest.approx(curve(theirs, metric), rel=0.05, abs=0.03), metric
