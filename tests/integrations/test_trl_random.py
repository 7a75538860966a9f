"""GRPO in SRPOTrainer beside TRL's GRPOTrainer, with options of `GRPOConfig` drawn at random."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", "1.16", reason="the trl integration needs trl >= 1.16")

from tests.tiny_models import tiny_model_of
from tests.tiny_trainer import ScriptedGRPO, ScriptedSRPO, graded, one_correct, prompts, tiny_tokenizer, train

# A scale, a softcap, a bias of the head, a tied head, experts.
MODELS: dict[str, dict[str, Any]] = {"llama": {}, "gemma2": {}, "phi": {}, "mixtral": {}}
MODELS |= {"granite": {"logits_scaling": 0.5}, "qwen3": {"tie_word_embeddings": True}}


def sparse(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """None for some completions."""
    return [None if sum(ids) % 7 == 0 else (len(ids) % 3) / 2 for ids in completion_ids]


# How often an option is given, and its values.
CHOICES: dict[str, tuple[float, tuple[Any, ...]]] = {
    "loss_type": (0.9, ("bnpo", "grpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo")),
    "importance_sampling_level": (0.4, ("sequence",)),
    "beta": (0.4, (0.1, 0.3)),
    "use_bias_correction_kl": (1.0, (False, True)),
    "delta": (0.2, (1.02, 1.3)),
    "epsilon": (1.0, (0.02, 0.2)),
    "epsilon_high": (1.0, (None, 0.03, 0.28, 1.01, 5.0)),
    "scale_rewards": (1.0, ("none", "group", "batch")),
    "num_iterations": (0.5, (2, 3)),
    "gradient_accumulation_steps": (0.6, (2, 3)),
    "steps_per_generation": (0.5, (1, 2, 3, 4, 6)),
    "per_device_train_batch_size": (0.5, (4,)),
    "num_generations": (0.5, (2,)),
    "top_entropy_quantile": (0.15, (0.0, 0.2, 0.5)),
    "entropy_coef": (0.2, (0.01, -0.02)),
    "use_adaptive_entropy": (0.1, (True,)),
    "off_policy_mask_threshold": (0.15, (0.01, 0.3)),
    "temperature": (0.3, (0.6, 1.3)),
    "pad_to_multiple_of": (0.2, (8,)),
    "cast_lm_head_to_fp32": (0.2, (True,)),
    "gradient_checkpointing": (0.2, (True,)),
    "mask_truncated_completions": (0.3, (True,)),
    "max_completion_length": (0.2, (6, 32)),
    "max_grad_norm": (0.3, (0.1,)),
    "sync_ref_model": (0.2, (True,)),
    "multi_objective_aggregation": (0.3, ("normalize_then_sum",)),
    "reward": (1.0, (graded, one_correct, sparse, [graded, sparse])),
    "router_aux_loss_coef": (0.5, (0.5,)),
    "model": (1.0, tuple(MODELS)),
    "dataset": (1.0, (4, 8, 12)),
}


def drawn(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    options = {name: draw.choice(values) for name, (often, values) in CHOICES.items() if draw.random() < often}
    if "beta" not in options:
        options.pop("sync_ref_model", None)
    if options["model"] != "mixtral":
        options.pop("router_aux_loss_coef", None)
    options["dataset"] = prompts(options["dataset"], chat=draw.random() < 0.7)
    # Adam would scale the rounding of a gradient that is all but 0.
    return options | {"optim": "sgd", "learning_rate": 0.3, "max_steps": 3, "ref_model_sync_steps": 1}


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=() if seed < 4 else pytest.mark.slow) for seed in range(60)])
def test_any_options_are_trls(seed: int, tmp_path: Path) -> None:
    options = drawn(seed)
    name = options["model"]
    model = tiny_model_of(name, vocab_size=47, pad_token_id=0, eos_token_id=1, **MODELS[name])
    options["model"] = str(tmp_path / "model")
    model.save_pretrained(options["model"])
    tiny_tokenizer().save_pretrained(options["model"])
    theirs = train(ScriptedGRPO, tmp_path / "theirs", **options)
    own = {"method": "grpo", "token_denominator": "generation_batch"}
    ours = train(ScriptedSRPO, tmp_path / "ours", **options, **own)
    unequal = {"step_time"}
    if options.get("loss_type") == "vespo":
        # Its weight of a group of equal rewards goes by the sign of TRL's advantages there, the rounding of a mean.
        unequal.add("vespo/phi_seq_mean")
    for expected, mine in zip(theirs.state.log_history[:-1], ours.state.log_history[:-1], strict=True):
        for metric in expected.keys() - unequal:
            same = pytest.approx(expected[metric], rel=3e-4, abs=1e-5, nan_ok=True)
            assert mine[metric] == same, (metric, options)
    for key, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, theirs.model.get_parameter(key), rtol=1e-3, atol=1e-4, msg=key)
