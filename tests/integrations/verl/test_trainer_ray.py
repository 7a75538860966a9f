"""verl's training under Ray, end to end, on the toy task of examples/verl: rewards rise; a lost worker ends it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

pytest.importorskip("verl.workers.engine", reason="the trainer needs verl with all it wants: `make test-verl` does it")
pytest.importorskip("ray", reason="verl's trainer needs ray")

from tests.integrations.verl import hf_rollout, toy
from tests.integrations.verl.runs import logged, steps, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    toy.write(folder)
    return folder


@pytest.fixture(scope="module")
def one_worker(folder: Path) -> str:
    return steps(train(folder, "one worker"))


def rewards_rise(folder: Path, lines: str, run: str, workers: int) -> None:
    correct, routed = logged(lines, "srpo/correct_fraction"), logged(lines, "srpo/routed_fraction")
    assert len(correct) == 16
    # 24 words of 60 are correct: the mean of 128 replies that have learnt nothing is 0.4, give or take 0.04.
    assert sum(correct[-4:]) / 4 > 0.55, correct
    assert max(routed) > 0.0
    assert all(norm > 0.0 for norm in logged(lines, "actor/grad_norm"))
    # Log-probs of the rollout are those of the trainer, up to bf16.
    assert max(logged(lines, "training/rollout_probs_diff_mean")) < 0.02
    saved = sorted(path.name for path in (folder / run / "global_step_16" / "actor").glob("srpo_*"))
    assert saved == [f"srpo_teacher_world_size_{workers}_rank_{rank}.pt" for rank in range(workers)]


def test_rewards_rise(folder: Path, one_worker: str) -> None:
    rewards_rise(folder, one_worker, "one_worker", 1)


def test_rewards_rise_on_two_workers(folder: Path) -> None:
    rewards_rise(folder, steps(train(folder, "two workers")), "two_workers", 2)


def test_a_run_goes_on_where_it_ended(folder: Path, one_worker: str) -> None:
    lines = steps(train(folder, "resumed"))
    assert logged(lines, "training/global_step") == [17.0]
    [correct] = logged(lines, "srpo/correct_fraction")
    # Of 32 replies.
    assert correct > 0.5


def test_sdpo_with_feedback_a_live_teacher_and_old_log_probs_of_the_rollout(folder: Path) -> None:
    lines = steps(train(folder, "feedback"))
    assert len(logged(lines, "actor/grad_norm")) == 2
    assert logged(lines, "srpo/sdpo_token_fraction")[0] > 0.5
    # The old log-probs are not computed.
    assert not logged(lines, "actor/entropy")


@pytest.mark.parametrize("run", ["reference", "adapters"])
def test_a_reference_is_the_model_at_the_start(folder: Path, run: str) -> None:
    """Another model, and with LoRA the model without its adapters."""
    lines = steps(train(folder, run))
    first, second = logged(lines, "srpo/ref_kl")
    assert first == pytest.approx(0.0, abs=1e-6)
    assert second > 1e-6
    assert all(norm > 0.0 for norm in logged(lines, "actor/grad_norm"))
    assert bool(logged(lines, "srpo/routed_fraction")) == (run == "adapters")


def test_a_lost_worker_ends_the_run(folder: Path) -> None:
    start = time.monotonic()
    run = train(folder, "lost worker", timeout=600, **{hf_rollout.DIES_AT: "2"})
    assert run.returncode != 0
    assert time.monotonic() - start < 600
    assert "ActorDiedError" in run.stdout + run.stderr or "died" in run.stdout + run.stderr
