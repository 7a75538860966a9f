"""The example's rollouts: prompts, masks, rewards, and the alignment of hidden states with replies."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("transformers", reason="the demo's model is one of transformers")

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import srpo_kernels as sk
from examples.loop import teacher_question
from examples.rollouts import Rollouts, encode_chats, reprompted_hidden, response_hidden, response_mask, sample_rollouts
from examples.tasks import SETTINGS, TaskName, problems
from tests.demo_model import make_model, make_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model()


@pytest.fixture
def rollouts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Rollouts:
    """Two groups, prompts of different lengths, and replies that end early, late and at once."""
    rollouts = sample_rollouts(
        model, tokenizer, ["Short", "A longer question"], group_size=8, max_new_tokens=8, temperature=1.0
    )
    response_ids = rollouts.response_ids.clone()
    response_ids[1, 3:] = response_ids[9, 5:] = response_ids[2] = tokenizer.eos_token_id
    return rollouts._replace(response_ids=response_ids, mask=response_mask(response_ids, 0))


def plain_log_probs(model: PreTrainedModel, prompt: list[int], response: list[int]) -> Tensor:
    """Of one reply, by one unpadded forward to the logits."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
    predicted = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return predicted.gather(1, torch.tensor(response)[:, None])[:, 0]


def test_the_teacher_prompt_shows_question_solution_and_request_in_this_order() -> None:
    text = teacher_question("What is 2 + 3?", "It is 5.")
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
