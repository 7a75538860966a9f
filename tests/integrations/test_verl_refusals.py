"""Options of verl and of the `srpo` section that are refused before anything is started, each by its name."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests import verl_path

pytest.importorskip("transformers", reason="the options need transformers")
pytestmark = pytest.mark.skipif(not verl_path.INSTALLED, reason="verl is not installed: `make test` does it")

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
ULYSSES = f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size"


@pytest.fixture(scope="module")
def options() -> Iterator[ModuleType]:
    with verl_path.importable():
        yield importlib.import_module("srpo_kernels.integrations.verl.options")


def check(options: ModuleType, **changes: Any) -> Any:
    """What `check_config` says of verl's defaults with these changes."""
    OmegaConf = importlib.import_module("omegaconf").OmegaConf
    folder = Path(importlib.import_module("verl").__file__).parent / "trainer" / "config"
    config = OmegaConf.load(folder / "_generated_ppo_trainer.yaml")
    for name, value in changes.items():
        OmegaConf.update(config, name, value, force_add=True)
    return options.check_config(config)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"trainer.use_v1": False}, "trainer.use_v1 must be True"),
    ({"trainer.v1.trainer_mode": "colocate_async"}, "trainer.v1.trainer_mode must be one of"),
    ({"trainer.v1.trainer_mode": "separate_async"}, "trainer.v1.trainer_mode must be one of"),
    ({"actor_rollout_ref.model.use_fused_kernels": True}, "actor_rollout_ref.model.use_fused_kernels must be False"),
    ({"actor_rollout_ref.model.mtp.enable": True}, "actor_rollout_ref.model.mtp.enable must be False"),
    ({f"{ACTOR}.use_prefix_grouper": True}, f"{ACTOR}.use_prefix_grouper must be False"),
    ({f"{ACTOR}.calculate_entropy": True}, f"{ACTOR}.calculate_entropy must be False"),
    ({f"{ACTOR}.fsdp_config.qat.enable": True}, f"{ACTOR}.fsdp_config.qat.enable must be False"),
    ({"distillation.enabled": True}, "distillation.enabled must be False"),
    ({f"{ACTOR}.strategy": "megatron"}, f"{ACTOR}.strategy must be one of"),
    ({"actor_rollout_ref.ref.strategy": "veomni"}, "actor_rollout_ref.ref.strategy must be one of"),
    ({f"{ROLLOUT}.temperature": 0.0}, f"{ROLLOUT}.temperature must be > 0"),
    ({f"{ROLLOUT}.multi_turn.tool_config_path": "tools.yaml"}, f"{ROLLOUT}.multi_turn.tool_config_path must be null"),
    ({f"{ROLLOUT}.multi_turn.function_tool_path": "a.py"}, f"{ROLLOUT}.multi_turn.function_tool_path must be null"),
    ({f"{ACTOR}.policy_loss.loss_mode": "bypass_mode"}, "actor.policy_loss.loss_mode must be one of"),
    ({f"{ACTOR}.policy_loss.loss_mode": "srpo"}, "actor.policy_loss.loss_mode must be one of"),
    ({f"{ACTOR}.policy_loss.loss_mode": "dro"}, "actor.policy_loss.dro_beta must be given"),
    ({f"{ACTOR}.policy_loss.loss_mode": "sapo"}, "actor.loss_agg_mode must be 'seq-mean-token-mean'"),
    ({f"{ACTOR}.policy_loss.loss_mode": "geo_mean"}, "actor.loss_agg_mode must be 'seq-mean-token-mean'"),
    (
        {
            f"{ACTOR}.policy_loss.loss_mode": "geo_mean",
            f"{ACTOR}.loss_agg_mode": "seq-mean-token-mean",
            "algorithm.rollout_correction.rollout_is": "token",
        },
        "algorithm.rollout_correction.rollout_is must be null or 'sequence'",
    ),
    ({f"{ACTOR}.policy_loss.loss_mode": "kl_cov", ULYSSES: 2}, f"{ULYSSES} must be 1"),
    (
        {f"{ACTOR}.policy_loss.loss_mode": "clip_cov", f"{ACTOR}.ulysses_sequence_parallel_size": 2},
        f"{ACTOR}.ulysses_sequence_parallel_size must be 1",
    ),
    ({f"{ACTOR}.loss_agg_mode": "mean"}, "actor.loss_agg_mode must be one of"),
    ({f"{ACTOR}.loss_agg_mode": "seq-mean-token-sum-norm"}, "actor.loss_scale_factor must be given"),
    ({f"{ACTOR}.loss_scale_factor": 5}, "actor.loss_scale_factor must be null"),
    ({f"{ACTOR}.use_kl_loss": True, f"{ACTOR}.kl_loss_type": "abs"}, "actor.kl_loss_type must be one of"),
    ({f"{ACTOR}.use_kl_loss": True, f"{ACTOR}.kl_loss_coef": -1.0}, "actor.kl_loss_coef must be"),
    ({f"{ACTOR}.clip_ratio_low": -0.1}, "actor.clip_ratio_low must be"),
    ({f"{ACTOR}.clip_ratio_high": -0.1}, "actor.clip_ratio_high must be"),
    ({f"{ACTOR}.clip_ratio_c": 0.5}, "actor.clip_ratio_c must be"),
    ({f"{ACTOR}.entropy_coeff": float("nan")}, "actor.entropy_coeff must be"),
    (
        {f"{ACTOR}.policy_loss.loss_mode": "clip_cov", f"{ACTOR}.policy_loss.clip_cov_ratio": 0.0},
        "actor.clip_cov_ratio must be",
    ),
    ({"srpo.method": "sdpo", f"{ACTOR}.use_kl_loss": True}, "with srpo.method=sdpo"),
    ({"srpo.methode": "sdpo"}, "srpo must have the options of SRPOOptions, ['methode'] are none"),
    ({"srpo.method": "ppo"}, "srpo.method must be one of"),
    ({"srpo.teacher_model_kind": "none"}, "srpo.teacher_model_kind must be one of"),
    ({"srpo.teacher_update_rate": 0.0}, "srpo.teacher_update_rate must be in (0, 1]"),
    ({"srpo.teacher_template": "{prompt}"}, "srpo.teacher_template must have the fields"),
    ({"srpo.solution_template": ""}, "srpo.solution_template must have the fields"),
    ({"srpo.feedback_template": "{prompt}"}, "srpo.feedback_template must have the fields"),
    ({"srpo.max_teacher_length": 0}, "srpo.max_teacher_length must be null or at least 1"),
    ({"srpo.teacher_tokens_per_gpu": 0}, "srpo.teacher_tokens_per_gpu must be null or at least 1"),
    ({"srpo.workspace_bytes": 0}, "srpo.workspace_bytes must be null or at least 1"),
    ({"srpo.distillation_alpha": 1.5}, "srpo.distillation_alpha must be"),
    ({"srpo.distillation_mode": "half"}, "srpo.distillation_mode must be"),
    ({"srpo.distillation_topk": 0}, "srpo.distillation_topk must be"),
    ({"srpo.distillation_add_tail": 1}, "srpo.distillation_add_tail must be"),
    ({"srpo.distillation_is_clip": 0.0}, "srpo.distillation_is_clip must be"),
    ({"srpo.dw_beta": -1.0}, "srpo.dw_beta must be"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message.partition(" ")[0] for _, message in REFUSED])
def test_an_option_is_refused_by_its_name(options: ModuleType, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        check(options, **changes)
    assert message in str(raised.value)


ACCEPTED: list[dict[str, Any]] = [
    {},
    {"srpo.method": "grpo", f"{ROLLOUT}.multi_turn.tool_config_path": "tools.yaml"},
    {f"{ACTOR}.policy_loss.loss_mode": "kl_cov"},
    {f"{ACTOR}.policy_loss.loss_mode": "gspo", ULYSSES: 2},
    {f"{ACTOR}.policy_loss.loss_mode": "srpo_sapo"},
    {"algorithm.rollout_correction.bypass_mode": True},
]


@pytest.mark.parametrize("changes", ACCEPTED)
def test_options_beside_them_are_not(options: ModuleType, changes: dict[str, Any]) -> None:
    assert check(options, **changes).method == changes.get("srpo.method", "srpo")
