"""The teacher of verl's engine over steps: its values, its checkpoints, and what leaves it alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import needs_gloo, run_ranks

pytest.importorskip("verl.workers.engine", reason="the engine needs verl with all it wants: `make test-verl` does it")

from tests.integrations.verl import state_ranks, tiny
from tests.integrations.verl.engine_ranks import Case

pytestmark = [pytest.mark.slow, needs_gloo]

CASES = [
    Case("FSDP2"),
    Case("FSDP1", strategy="fsdp"),
    Case("FSDP1, original parameters", strategy="fsdp", original=True),
    Case("LoRA", lora="adapter"),
    Case("offloaded", offload=True),
    Case("bf16 parameters", bf16=True),
    Case("frozen", teacher="frozen"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    models, checkpoints = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("checkpoints")
    tiny.save_models(models)
    return run_ranks(_states, 2, models, checkpoints, timeout_seconds=900)[0]


def _states(rank: int, models: Path, checkpoints: Path) -> dict[str, dict[str, Any]]:
    return {case.name: state_ranks.states(case, models, checkpoints / case.name) for case in CASES}


@pytest.mark.parametrize("name", [case.name for case in CASES])
class TestStates:
    def test_three_steps_are_a_plain_loops(self, results: dict[str, dict[str, Any]], name: str) -> None:
        got, wanted, student = (results[name][key] for key in ("averages", "plain", "student"))
        assert got.keys() == wanted.keys()
        for key, average in got.items():
            torch.testing.assert_close(average, wanted[key], rtol=1e-6, atol=1e-7)
        assert any(not torch.equal(average, student[key].float()) for key, average in got.items())

    def test_the_student_is_as_it_was_after_the_teachers_forwards(
        self, results: dict[str, dict[str, Any]], name: str
    ) -> None:
        before, after = results[name]["before_teacher"], results[name]["after_teacher"]
        assert all(torch.equal(before[key], after[key]) for key in before)

    def test_a_norm_that_is_not_finite_leaves_the_average_alone(
        self, results: dict[str, dict[str, Any]], name: str
    ) -> None:
        assert not torch.tensor(results[name]["norm"]).isfinite()
        assert results[name]["unmoved"]

    def test_a_checkpoint_has_the_average(self, results: dict[str, dict[str, Any]], name: str) -> None:
        assert results[name]["restored"]
        assert results[name]["next_losses"][0] == results[name]["next_losses"][1]

    def test_a_checkpoint_without_an_average_is_refused(self, results: dict[str, dict[str, Any]], name: str) -> None:
        assert "the checkpoint must be of a run with a teacher" in results[name]["refusal"]
