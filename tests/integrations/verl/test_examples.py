"""The configurations of examples/verl: the large one is accepted, and has no option that no run of a test has."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import yaml

pytest.importorskip("hydra", reason="verl's configuration needs hydra: `make test-verl` installs it")
pytest.importorskip("verl.workers.engine", reason="the engine needs verl with all it wants: `make test-verl` does it")

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from verl.trainer.main_ppo import TaskRunnerV1
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config

from srpo_kernels.integrations.verl import main
from srpo_kernels.integrations.verl.options import check_config
from tests.integrations.verl.runs import EXAMPLES, RUNS, overrides

# What only a machine with accelerators and vLLM runs.
ELSEWHERE = {
    "actor_rollout_ref.model.path",
    "actor_rollout_ref.rollout.name",
    "actor_rollout_ref.rollout.tensor_model_parallel_size",
    "actor_rollout_ref.rollout.gpu_memory_utilization",
    "data.max_response_length",
    "trainer.n_gpus_per_node",
}


def composed(name: str, *options: str) -> Any:
    with initialize_config_dir(str(EXAMPLES), version_base=None):
        return compose(name, overrides=["hydra.searchpath=[pkg://verl.trainer.config]", *options])


def own_options(name: str) -> dict[str, Any]:
    """Those that the file sets itself."""

    def flat(values: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(values, dict):
            return {prefix: values}
        parts = [flat(value, f"{prefix}.{key}" if prefix else key) for key, value in values.items()]
        return {name: value for part in parts for name, value in part.items()}

    return flat(
        {k: x for k, x in yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text()).items() if k != "defaults"}, ""
    )


def test_the_large_run_is_the_papers_and_is_accepted() -> None:
    assert main.CONFIG_NAME in (EXAMPLES / "qwen3_8b.yaml").read_text()
    config = composed("qwen3_8b")
    options = check_config(config)
    validate_config(config, need_reference_policy(config), need_critic(config))
    assert (options.method, options.distillation_alpha, options.teacher_update_rate) == ("srpo", 0.5, 0.05)
    assert (options.distillation_is_clip, options.dw_beta) == (2.0, 1.0)
    actor = config.actor_rollout_ref.actor
    assert (actor.optim.lr, actor.clip_ratio_low, actor.clip_ratio_high) == (5e-6, 0.2, 0.28)
    assert (config.data.train_batch_size, actor.ppo_mini_batch_size, config.actor_rollout_ref.rollout.n) == (32, 32, 8)
    assert config.algorithm.adv_estimator == "grpo" and not config.algorithm.norm_adv_by_std_in_grpo


def test_options_are_checked_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[Any, Any]] = []
    monkeypatch.setattr(main, "run_ppo", lambda config, runner: started.append((config, runner)))
    with pytest.raises(ValueError, match=r"actor_rollout_ref\.model\.use_fused_kernels must be False"):
        main.run(composed("toy", "actor_rollout_ref.model.use_fused_kernels=true"))
    assert not started
    main.run(composed("toy"))
    [(config, runner)] = started
    assert runner is TaskRunnerV1
    modules = config.ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES
    assert modules.split(",")[-1] == "srpo_kernels.integrations.verl.trainer"


def test_the_module_says_what_is_registered() -> None:
    command = [sys.executable, "-m", "srpo_kernels.integrations.verl", "--trainer"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "srpo_grpo" in run.stdout
    assert "trainer SRPOTrainer, engines for fsdp on cpu, cuda, npu; fsdp2 on cpu, cuda, npu" in run.stdout


def test_every_option_of_the_large_run_is_one_that_a_run_of_a_test_sets() -> None:
    """To the same value."""
    toy = own_options("toy")
    runs = [composed("toy", *overrides(run)) for run in RUNS]
    alone = {
        name
        for name, value in own_options("qwen3_8b").items()
        if not any(
            (name in toy or name in options) and OmegaConf.select(run, name) == value
            for run, options in zip(runs, RUNS.values(), strict=True)
        )
    }
    assert alone == ELSEWHERE
