"""`python -m srpo_kernels.integrations.verl.main`: training with verl and SRPO's loss.

Options are Hydra's: `python -m srpo_kernels.integrations.verl.main --cfg job` prints all of them with their defaults,
`data.train_files=train.parquet srpo.method=sdpo` sets two. Defaults that differ from verl's are SRPO's (arXiv
2604.02288): 32 prompts of 8 rollouts per optimizer step, a learning rate of 5e-6, clips of 0.2 and 0.28, and advantages
without the standard deviation.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf, open_dict
from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config
from verl.utils.device import auto_set_device

from srpo_kernels.integrations.verl.options import SRPOOptions, check_config

CONFIG_NAME = "srpo_trainer"
# What registers the trainer in the processes of Ray, one of which looks for it by name.
_MODULE = "srpo_kernels.integrations.verl.trainer"
_VARIABLE = "VERL_USE_EXTERNAL_MODULES"

ConfigStore.instance().store(
    CONFIG_NAME,
    {
        "defaults": ["ppo_trainer", "_self_"],
        "srpo": asdict(SRPOOptions()),
        "trainer": {"v1": {"trainer_mode": "srpo"}},
        "algorithm": {"adv_estimator": "grpo", "norm_adv_by_std_in_grpo": False},
        "data": {"train_batch_size": 32},
        "actor_rollout_ref": {
            "actor": {
                "ppo_mini_batch_size": 32,
                "clip_ratio_low": 0.2,
                "clip_ratio_high": 0.28,
                "optim": {"lr": 5e-6},
            },
            "rollout": {"n": 8},
        },
    },
)


def run(config: Any) -> None:
    """Check verl's configuration and train.

    Raises ValueError for an option that is not honoured, and what verl raises.
    """
    auto_set_device(config)
    check_config(config)
    validate_config(config=config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    name = f"ray_kwargs.ray_init.runtime_env.env_vars.{_VARIABLE}"
    modules = OmegaConf.select(config, name) or os.environ.get(_VARIABLE)
    with open_dict(config):
        OmegaConf.update(config, name, ",".join(filter(None, [modules, _MODULE])), force_add=True)
    run_ppo(config, TaskRunnerV1)


@hydra.main(config_path="pkg://verl.trainer.config", config_name=CONFIG_NAME, version_base=None)
def main(config: Any) -> None:
    """Train with the options of the command line."""
    run(config)


if __name__ == "__main__":
    main()
