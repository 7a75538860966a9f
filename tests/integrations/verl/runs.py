"""The runs of the toy task that tests make: the options of each beside examples/verl/toy.yaml, and what they log."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples" / "verl"
MODULES = "tests.integrations.verl.cpu_platform,tests.integrations.verl.hf_rollout"
_NUMBER = r"(?:np\.float64\()?(-?[\d.]+(?:e-?\d+)?|nan)\)?"

_SHORT = {"trainer.val_before_train": False, "trainer.save_freq": -1, "trainer.test_freq": -1}
_TWO_STEPS = {**_SHORT, "trainer.total_training_steps": 2}
RUNS: dict[str, dict[str, Any]] = {
    "one worker": {"trainer.total_training_steps": 16, "trainer.val_before_train": False},
    "resumed": {
        **_SHORT,
        "trainer.total_training_steps": 17,
        "trainer.resume_mode": "auto",
        "trainer.default_local_dir": "${toy}/one_worker",
    },
    "two workers": {
        "trainer.n_gpus_per_node": 2,
        "trainer.total_training_steps": 16,
        "trainer.val_before_train": False,
    },
    "feedback": {
        **_TWO_STEPS,
        "srpo.method": "sdpo",
        "srpo.teacher_model_kind": "live",
        "srpo.success_reward": "acc",
        "srpo.feedback": "feedback",
        "algorithm.rollout_correction.bypass_mode": True,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 2,
        "actor_rollout_ref.actor.ppo_epochs": 2,
    },
    "reference": {
        **_TWO_STEPS,
        "srpo.method": "grpo",
        "actor_rollout_ref.actor.use_kl_loss": True,
        "actor_rollout_ref.actor.entropy_coeff": 0.01,
    },
    # With the numbers of the large run.
    "adapters": {
        "trainer.total_training_steps": 2,
        "trainer.experiment_name": "qwen3_8b",
        "trainer.total_epochs": 30,
        "trainer.save_freq": 20,
        "trainer.test_freq": 10,
        "srpo.max_teacher_length": 20480,
        "srpo.teacher_tokens_per_gpu": 24576,
        "data.max_prompt_length": 2048,
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 24576,
        "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu": 32768,
        "actor_rollout_ref.model.lora_rank": 4,
        "actor_rollout_ref.model.lora.merge": True,
        "actor_rollout_ref.actor.use_kl_loss": True,
    },
    "lost worker": {**_SHORT, "trainer.n_gpus_per_node": 2, "trainer.total_training_steps": 8},
}


def overrides(run: str) -> list[str]:
    """The options of a run as Hydra takes them."""
    words = {True: "true", False: "false"}
    return [f"{name}={words[x] if isinstance(x, bool) else x}" for name, x in RUNS[run].items()]


def train(folder: Path, run: str, timeout: float = 1500, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command of examples/verl/toy.yaml with the options of a run."""
    command = [sys.executable, "-m", "srpo_kernels.integrations.verl.main", "--config-dir", str(EXAMPLES)]
    command += ["--config-name", "toy", f"toy={folder}", f"hydra.run.dir={folder}/hydra"]
    command += [f"trainer.default_local_dir={folder}/{run.replace(' ', '_')}"]
    command += [f"reward.custom_reward_function.path={ROOT / 'tests/integrations/verl/toy.py'}", *overrides(run)]
    environment = {
        **os.environ,
        "VERL_USE_EXTERNAL_MODULES": MODULES,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_DEDUP_LOGS": "0",
        **variables,
    }
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def logged(output: str, name: str) -> list[float]:
    """The values of a metric, step by step, in what verl's console logger prints."""
    return [float(x) for x in re.findall(rf"(?:^|\s|-){re.escape(name)}:{_NUMBER}(?=\s|$)", output)]


def steps(run: subprocess.CompletedProcess[str]) -> str:
    """The lines of verl's console logger of a run that has ended well."""
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return "\n".join(x for x in (run.stdout + run.stderr).splitlines() if "training/global_step:" in x)
