"""SRPOTrainer in two processes, in DDP and in FSDP of both versions: they train as one does, and log what TRL logs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", "1.16", reason="the trl integration needs trl >= 1.16")

from tests.ddp_trainer import resolved
from tests.tiny_trainer import ScriptedSRPO, curve, train


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


# One group over both processes: a teacher may have to show what the other process generated.
SHARED = {"num_generations": 16, "gradient_accumulation_steps": 2, "max_steps": 3}
FSDP2 = {"version": 2, "reshard_after_forward": True}
# Parameters are sent to the others from a device alone.
FSDP1 = {"version": 1, "sync_module_states": False}
FLAT = FSDP1 | {"use_orig_params": False}
# The LM head, of 752 elements, is a unit of its own.
BY_SIZE = FSDP1 | {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 700}
RESUMED = {"resume": 2, "lr_scheduler_type": "constant"}
# Both ranks have the rows of a process.
IN_SHARDS = SHARED | {
    "loaded": {"tp_size": 2},
    "trainer": "SharedSRPO",
    "num_generations": 8,
    "per_device_train_batch_size": 8,
}
RUNS: dict[str, dict[str, Any]] = {
    "tokens": SHARED,
    "sequences": SHARED | {"loss_type": "grpo"},
    "sdpo": SHARED | {"method": "sdpo"},
    "log-probs": SHARED | {"off_policy_mask_threshold": 1e6},
    "FSDP2": SHARED | {"shards": FSDP2},
    "FSDP2, log-probs": SHARED | {"shards": FSDP2, "off_policy_mask_threshold": 1e6},
    "FSDP2, a saved head, resumed": SHARED | RESUMED | {"shards": FSDP2, "lora": {"modules_to_save": ["lm_head"]}},
    "FSDP2 of transformers": SHARED | {"loaded": {"fsdp_size": 2}},
    "FSDP1, resumed": SHARED | RESUMED | {"shards": FSDP1},
    "FSDP1, flat, resumed": SHARED | RESUMED | {"shards": FLAT},
    "FSDP1, live": SHARED | {"shards": FSDP1, "teacher_model_kind": "live", "method": "sdpo"},
    "FSDP1, another model": SHARED | {"shards": BY_SIZE, "other": "tiny_model"},
    "FSDP1, flat, LoRA": SHARED | {"shards": FLAT, "lora": {}},
    "FSDP1, flat, a saved head": SHARED | {"shards": FLAT, "lora": {"modules_to_save": ["lm_head"]}},
    "FSDP1, tokens": SHARED | {"shards": FSDP1, "lora": {"trainable_token_indices": {"lm_head": [5, 20]}}},
    "FSDP1, log-probs": SHARED | {"shards": FSDP1, "off_policy_mask_threshold": 1e6},
    "FSDP1, padding-free": SHARED | {"shards": BY_SIZE, "padding_free": True},
    # transformers resumes none.
    "tensor parallelism": IN_SHARDS | {"save_strategy": "steps", "save_steps": 2, "save_only_model": True},
    "tensor parallelism, log-probs": IN_SHARDS | {"off_policy_mask_threshold": 1e6},
    "tensor parallelism, live": IN_SHARDS | {"teacher_model_kind": "live", "method": "sdpo", "padding_free": True},
    "tensor parallelism, another model": IN_SHARDS | {"other": "divisible_model"},
    "tensor parallelism, LoRA": IN_SHARDS | {"lora": {}, "num_iterations": 2},
}
# The ratios move far enough for the clips.
CLIPPED = SHARED | {"num_iterations": 2, "learning_rate": 3e-2, "epsilon": 0.02, "epsilon_high": 0.03}
# TRL's bonus is a mean of means: one that is too small to part the models.
CLIPPED |= {"scale_rewards": "none", "entropy_coef": 1e-6}
OTHER_RUNS: dict[str, dict[str, Any]] = {
    "equal": SHARED | {"reward": "equal", "scale_rewards": "group"},
    "tokens' metrics": CLIPPED | {"method": "grpo"},
    "tokens' metrics of TRL": CLIPPED | {"trainer": "ScriptedGRPO"},
    "sequences' metrics": CLIPPED | {"method": "grpo", "importance_sampling_level": "sequence"},
    "sequences' metrics of TRL": CLIPPED | {"trainer": "ScriptedGRPO", "importance_sampling_level": "sequence"},
}


def two_processes(
    folder: Path, runs: dict[str, dict[str, Any]], processes: int = 2
) -> dict[str, list[dict[str, float]]]:
    """What two processes, or more, logged in each run."""
    port = str(free_port())
    runs = {name: {"per_device_train_batch_size": 4} | options for name, options in runs.items()}
    command = [sys.executable, "-m", "tests.ddp_trainer", str(folder), json.dumps(runs)]
    size = str(processes)
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    workers = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    errors = [worker.communicate(timeout=600)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * processes, errors
    read: dict[str, list[dict[str, float]]] = json.loads((folder / "histories.json").read_text())
    return read


@pytest.fixture(scope="module")
def histories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    """What two processes logged in each run."""
    return two_processes(tmp_path_factory.mktemp("ddp"), RUNS | OTHER_RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(name: str, histories: Any, tmp_path: Path) -> None:
    options = {key: value for key, value in RUNS[name].items() if key not in ("shards", "resume", "trainer")}
    alone = train(ScriptedSRPO, tmp_path, **resolved(options))
    assert curve(alone, "srpo/sdpo_token_fraction")[0] > 0.0
    for metric in ("loss", "grad_norm", *(key for key in alone.state.log_history[0] if key.startswith("srpo/"))):
        together = [entry[metric] for entry in histories[name] if metric in entry]
        assert together == pytest.approx(curve(alone, metric), rel=1e-4, abs=1e-5), metric


@pytest.mark.slow
def test_two_groups_of_tensor_parallelism_train_as_one_process(tmp_path: Path) -> None:
    # In groups that are drawn from in another order, another sibling would be shown.
    options = IN_SHARDS | {"method": "grpo", "num_generations": 4, "num_iterations": 2}
    loaded = {"loaded": {"tp_size": 2, "fsdp_size": 2}, "per_device_train_batch_size": 4}
    together = two_processes(tmp_path, {"both": options | loaded}, 4)["both"]
    alone = train(ScriptedSRPO, tmp_path, **resolved({name: x for name, x in options.items() if name != "trainer"}))
    for metric in ("loss", "grad_norm", "num_tokens", "reward"):
        assert [x[metric] for x in together if metric in x] == pytest.approx(curve(alone, metric), rel=1e-4, abs=1e-5)


def test_equal_rewards_over_two_processes_move_nothing(histories: Any) -> None:
    assert [entry["grad_norm"] for entry in histories["equal"][:-1]] == [0.0] * 3
    assert [entry["srpo/active_fraction"] for entry in histories["equal"][:-1]] == [0.0] * 3


@pytest.mark.parametrize("level", ["tokens", "sequences"])
def test_metrics_of_two_processes_are_trls(level: str, histories: Any) -> None:
    ours, theirs = histories[f"{level}' metrics"], histories[f"{level}' metrics of TRL"]
    assert theirs[1]["clip_ratio/region_mean"] > 0.0
    for mine, expected in zip(ours[:-1], theirs[:-1], strict=True):
        assert expected.keys() <= mine.keys()
        for name in expected.keys() - {"step_time", "loss", "grad_norm"}:
            assert mine[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name
