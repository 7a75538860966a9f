"""verl's training under Ray, end to end, on the toy task of examples/verl: rewards rise; a lost worker ends it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verl.workers.engine", reason="the trainer needs verl with all it wants: `make test-verl` does it")
pytest.importorskip("ray", reason="verl's trainer needs ray")

from tests.integrations.verl import hf_rollout, toy

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
MODULES = "tests.integrations.verl.cpu_platform,tests.integrations.verl.hf_rollout"
_NUMBER = r"(?:np\.float64\()?(-?[\d.]+(?:e-?\d+)?|nan)\)?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    toy.write(folder)
    return folder


def train(folder: Path, *options: str, timeout: float = 1500, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command of examples/verl/toy.yaml with more options."""
    command = [sys.executable, "-m", "srpo_kernels.integrations.verl.main", "--config-dir", "examples/verl"]
    command += ["--config-name", "toy", f"toy={folder}", f"hydra.run.dir={folder}/hydra"]
    command += [f"reward.custom_reward_function.path={ROOT / 'tests/integrations/verl/toy.py'}", *options]
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


def steps(output: str) -> str:
    return "\n".join(line for line in output.splitlines() if "training/global_step:" in line)


@pytest.mark.parametrize("workers", [1, 2])
def test_rewards_rise(folder: Path, workers: int) -> None:
    run = train(
        folder,
        f"trainer.n_gpus_per_node={workers}",
        "trainer.total_training_steps=16",
        "trainer.val_before_train=false",
        f"trainer.default_local_dir={folder}/checkpoints_{workers}",
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    lines = steps(run.stdout + run.stderr)
    correct, routed = logged(lines, "srpo/correct_fraction"), logged(lines, "srpo/routed_fraction")
    assert len(correct) == 16
    assert sum(correct[-4:]) / 4 > sum(correct[:4]) / 4 + 0.2, correct
    assert max(routed) > 0.0
    assert all(norm > 0.0 for norm in logged(lines, "actor/grad_norm"))
    # Log-probs of the rollout are those of the trainer, up to bf16.
    assert max(logged(lines, "training/rollout_probs_diff_mean")) < 0.02
    saved = sorted(
        path.name for path in (folder / f"checkpoints_{workers}" / "global_step_16" / "actor").glob("srpo_*")
    )
    assert saved == [f"srpo_teacher_world_size_{workers}_rank_{rank}.pt" for rank in range(workers)]


def test_sdpo_with_feedback_and_a_live_teacher(folder: Path) -> None:
    run = train(
        folder,
        "trainer.total_training_steps=2",
        "trainer.save_freq=-1",
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
        "srpo.method=sdpo",
        "srpo.teacher_model_kind=live",
        "srpo.success_reward=acc",
        "srpo.feedback=feedback",
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    lines = steps(run.stdout + run.stderr)
    assert len(logged(lines, "actor/grad_norm")) == 2
    assert logged(lines, "srpo/sdpo_token_fraction")[0] > 0.5


def test_a_lost_worker_ends_the_run(folder: Path) -> None:
    start = time.monotonic()
    run = train(
        folder,
        "trainer.n_gpus_per_node=2",
        "trainer.total_training_steps=8",
        "trainer.save_freq=-1",
        "trainer.test_freq=-1",
        "trainer.val_before_train=false",
        timeout=600,
        **{hf_rollout.DIES_AT: "2"},
    )
    assert run.returncode != 0
    assert time.monotonic() - start < 600
    assert "ActorDiedError" in run.stdout + run.stderr or "died" in run.stdout + run.stderr


def test_every_option_of_the_large_run_is_one_of_the_toys() -> None:
    import yaml

    def keys(values: Any, prefix: str = "") -> set[str]:
        if not isinstance(values, dict):
            return {prefix}
        return set().union(*(keys(value, f"{prefix}.{key}" if prefix else key) for key, value in values.items()))

    large, small = (
        keys(yaml.safe_load((ROOT / "examples/verl" / f"{name}.yaml").read_text())) for name in ("qwen3_8b", "toy")
    )
    assert large - small == set()
