"""SRPOTrainer in DeepSpeed's ZeRO: two processes, whose parameters are partitioned at stage 3, train as one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", "1.16", reason="the trl integration needs trl >= 1.16")
pytest.importorskip("deepspeed", reason="ZeRO is DeepSpeed's")

from tests.ddp_trainer import resolved
from tests.integrations.test_trl_processes import RESUMED, SHARED, two_processes
from tests.tiny_trainer import ScriptedSRPO, curve, train

RUNS: dict[str, dict[str, Any]] = {
    "stage 1": SHARED | {"zero": 1},
    "stage 2": SHARED | {"zero": 2},
    "stage 3": SHARED | {"zero": 3},
    "stage 3, small ones whole": SHARED | {"zero": 3, "persistent": 100},
    "stage 3, tied": SHARED | {"zero": 3, "tied": True},
    "stage 3, live": SHARED | {"zero": 3, "teacher_model_kind": "live", "method": "sdpo"},
    "stage 3, another model": SHARED | {"zero": 3, "other": "tiny_model"},
    "stage 3, LoRA": SHARED | {"zero": 3, "lora": {}},
    "stage 3, a saved head, resumed": SHARED | RESUMED | {"zero": 3, "lora": {"modules_to_save": ["lm_head"]}},
    "stage 3, tokens": SHARED | {"zero": 3, "lora": {"trainable_token_indices": {"lm_head": [5, 20]}}},
    "stage 3, log-probs": SHARED | {"zero": 3, "off_policy_mask_threshold": 1e6},
    "stage 3, padding-free": SHARED | {"zero": 3, "padding_free": True},
    "stage 3, resumed": SHARED | RESUMED | {"zero": 3},
}
OF_ZERO = ("zero", "persistent", "resume")


@pytest.fixture(scope="module")
def histories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    """What two processes logged in each run."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    return two_processes(tmp_path_factory.mktemp("zero"), RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_of_zero_train_as_one(name: str, histories: Any, tmp_path: Path) -> None:
    options = {key: value for key, value in RUNS[name].items() if key not in OF_ZERO}
    alone = train(ScriptedSRPO, tmp_path, **resolved(options))
    assert curve(alone, "srpo/sdpo_token_fraction")[0] > 0.0
    for metric in ("loss", "grad_norm", *(key for key in alone.state.log_history[0] if key.startswith("srpo/"))):
        together = [entry[metric] for entry in histories[name] if metric in entry]
        assert together == pytest.approx(curve(alone, metric), rel=1e-4, abs=1e-5), metric
