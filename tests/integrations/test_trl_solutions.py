"""Which completions SRPOTrainer shows to a teacher, and how."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", "1.16", reason="the trl integration needs trl >= 1.16")

from srpo_kernels.integrations.transformers.solutions import without_thinking
from tests.tiny_trainer import ScriptedSRPO, curve, tiny_model, tiny_tokenizer, tiny_trainer

EOS, PAD = 1, 0
TEMPLATE = "{prompt} after {solution}"


class Told(ScriptedSRPO):
    """Completes the prompts of a batch as it is told; ``tool_mask`` is of each token."""

    told: list[list[int]]
    tool_mask: list[list[int]] | None = None

    def _script(self, count: int) -> list[list[int]]:
        return [list(ids) for ids in self.told[:count]]

    def _generate(self, prompts: Any) -> Any:
        generated = list(super()._generate(prompts))
        generated[2] = self.tool_mask
        return tuple(generated)


def told(folder: Path, completions: list[list[int]], rewards: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A trainer and its batch of one group, scored by one list, or by several in a dict by their names."""
    tables = rewards if isinstance(rewards, dict) else {"reward": rewards}

    def function(name: str, table: list[float | None]) -> Any:
        def reward(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
            return table[: len(completion_ids)]

        reward.__name__ = name
        return reward

    tool_mask = options.pop("tool_mask", None)
    functions = [function(name, table) for name, table in tables.items()]
    defaults = {"teacher_template": TEMPLATE, "solution_template": "{solution}", "reward": functions}
    defaults |= dict.fromkeys(("num_generations", "per_device_train_batch_size"), len(completions))
    trainer = tiny_trainer(options.pop("trainer", Told), folder, **(defaults | options))
    trainer.told, trainer.tool_mask = completions, tool_mask
    trainer.model.train()
    examples = [dict(trainer.train_dataset[0]) for _ in completions]
    return trainer, trainer._generate_and_score_completions(examples)


def words(*ids: int) -> str:
    return str(tiny_tokenizer().decode(ids))


def shown(trainer: Any, batch: dict[str, Any]) -> list[str | None]:
    """What the teacher of each completion is shown, None for those that are not distilled."""
    texts = [trainer.processing_class.decode(ids) for ids in batch["teacher_prompt_ids"]]
    return [
        text.split(" after ")[1].removesuffix("assistant").strip() if routed else None
        for text, routed in zip(texts, batch["sdpo_mask"].tolist(), strict=True)
    ]


GOOD = [10, 11, 12, EOS]
UNSHOWABLE = {"truncated": [10, 11, 12], "empty": [EOS], "special tokens": [PAD, PAD, EOS], "no token": [PAD]}


@pytest.mark.parametrize("kind", UNSHOWABLE)
@pytest.mark.parametrize("method", ["srpo", "sdpo"])
@pytest.mark.parametrize("masked", [False, True])
def test_what_is_no_solution_is_not_shown(kind: str, method: str, masked: bool, tmp_path: Path) -> None:
    options = {"method": method, "mask_truncated_completions": masked}
    completions = [UNSHOWABLE[kind], [20, EOS], [21, EOS]]
    trainer, batch = told(tmp_path / "alone", completions, [1.0, 0.0, 0.0], **options)
    # No solution is left: all have the policy loss, which knows who was correct.
    assert batch["sdpo_mask"].tolist() == [False] * 3
    assert bool((batch["advantages"] > 0.0)[0]) is (method == "srpo")
    assert trainer._metrics["train"]["srpo/shown_fraction"] == [0.0]

    trainer, batch = told(tmp_path / "two", [*completions, GOOD], [1.0, 0.0, 0.0, 1.0], **options)
    solution = words(10, 11, 12)
    # A correct completion is not distilled by SRPO, whether it can be shown or not.
    first = solution if method == "sdpo" and not (masked and kind == "truncated") else None
    assert shown(trainer, batch) == [first, solution, solution, None]
    assert trainer._metrics["train"]["srpo/shown_fraction"] == [0.5]


def test_a_completion_of_tools_alone_is_not_shown(tmp_path: Path) -> None:
    tool_mask = [[0, 0, 0, 0], [1, 1], [1, 1], [1, 0, 1, 1]]
    completions = [[13, 13, 13, EOS], [20, EOS], [21, EOS], GOOD]
    trainer, batch = told(tmp_path, completions, [1.0, 0.0, 0.0, 1.0], tool_mask=tool_mask)
    assert shown(trainer, batch) == [None, words(10, 11, 12), words(10, 11, 12), None]


def test_the_named_reward_decides(tmp_path: Path) -> None:
    completions = [[10, EOS], [11, EOS], [12, EOS], [13, EOS]]
    rewards = {"right": [1.0, 0.0, None, 0.0], "well_formed": [0.0, 1.0, 1.0, 0.0]}
    # By the sum a well-formed completion is as good as a right one.
    trainer, batch = told(tmp_path / "sum", completions, rewards)
    assert batch["sdpo_mask"].tolist() == [False, False, False, True]
    trainer, batch = told(tmp_path / "named", completions, rewards, success_reward="right")
    # None is neither right nor wrong.
    assert shown(trainer, batch) == [None, words(10), None, words(10)]
    # It is weighted for the advantages alone.
    weights = {"success_reward": "right", "reward_weights": [0.1, 1.0]}
    assert shown(*told(tmp_path / "weights", completions, rewards, **weights)) == [None, words(10), None, words(10)]
    with pytest.raises(ValueError, match=r"success_reward must be the name .* \['right', 'well_formed'\], got 'wrong'"):
        told(tmp_path / "unknown", completions, rewards, success_reward="wrong")


THOUGHTS = {
    "<think>a</think>b": "b",
    "<think>\na\n</think>\n\nb": "b",
    "a</think>b": "b",
    "a <think>b</think> c <think>d</think> e": "a  c  e",
    "a <think>b": "a",
    "b": "b",
    "<think>a</think>": "",
    "a<think>b</think>c</think>d": "d",
}


def test_thinking_is_left_out() -> None:
    assert {text: without_thinking(text).strip() for text in THOUGHTS} == THOUGHTS


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("left_out", [False, True])
def test_thinking_is_not_shown(special: bool, left_out: bool, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    else:
        tokenizer.add_tokens(["<think>", "</think>"])
    start, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    model = tiny_model()
    model.resize_token_embeddings(len(tokenizer))
    completions = [[start, 10, end, 11, EOS], [20, EOS], [start, 10, 11, end, EOS], [start, 10, EOS]]
    options = {"model": model, "processing_class": tokenizer, "remove_thinking_from_solution": left_out}
    trainer, batch = told(tmp_path, completions, [1.0, 0.0, 0.0, 0.0], **options)
    thought = words(10) if special else f"<think> {words(10)} </think>"
    solution = words(11) if left_out else f"{thought} {words(11)}"
    assert shown(trainer, batch) == [None, solution, solution, solution]
    # Without its thinking the third one has no text.
    trainer, batch = told(tmp_path, completions, [0.0, 0.0, 1.0, 0.0], **options)
    assert batch["sdpo_mask"].tolist() == [not left_out, not left_out, False, not left_out]


# 3 words, "user", "after" and "assistant" are beside the solution.
BESIDE = 6


def teacher_lengths(batch: dict[str, Any]) -> list[int]:
    """Of the distilled completions."""
    completions = batch["completion_mask"].sum(1).tolist()
    lengths = [len(ids) + n for ids, n in zip(batch["teacher_prompt_ids"], completions, strict=True)]
    return [length for length, routed in zip(lengths, batch["sdpo_mask"].tolist(), strict=True) if routed]


def test_a_solution_that_is_too_long(tmp_path: Path) -> None:
    completions = [[10, 11, 12, 13, EOS], [20, 21, 22, EOS], [21, EOS]]
    rewards = [1.0, 0.0, 0.0]

    def run(name: str, length: int, **options: Any) -> tuple[Any, dict[str, Any]]:
        return told(tmp_path / name, completions, rewards, max_teacher_length=length, **options)

    # The longest that may be taught, of 4 tokens, decides for all.
    trainer, batch = run("fits", BESIDE + 4 + 4)
    assert shown(trainer, batch)[1:] == [words(10, 11, 12, 13)] * 2
    assert max(teacher_lengths(batch)) == BESIDE + 4 + 4
    trainer, batch = run("skipped", BESIDE + 4 + 3)
    assert shown(trainer, batch) == [None] * 3
    assert (batch["advantages"] != 0.0).all()
    trainer, batch = run("shortened", BESIDE + 4 + 3, shorten_solution=True)
    assert shown(trainer, batch)[1:] == [words(11, 12, 13)] * 2
    trainer, batch = run("one word", BESIDE + 4 + 1, shorten_solution=True)
    assert shown(trainer, batch)[1:] == [words(13)] * 2
    trainer, batch = run("no room", BESIDE + 4, shorten_solution=True)
    assert shown(trainer, batch) == [None] * 3


def test_the_length_is_the_models_where_none_is_given(tmp_path: Path) -> None:
    completions = [[10, 11, 12, 13, EOS], [20, 21, 22, EOS]]
    for positions, fits in ((BESIDE + 4 + 4, True), (BESIDE + 4 + 3, False)):
        model = tiny_model(max_position_embeddings=positions)
        batch = told(tmp_path, completions, [1.0, 0.0], model=model)[1]
        assert batch["sdpo_mask"].tolist() == [False, fits]
    with pytest.raises(ValueError, match="max_teacher_length must be at most the model's 128 positions, got 129"):
        told(tmp_path, completions, [1.0, 0.0], max_teacher_length=129)
    with pytest.raises(ValueError, match="max_teacher_length must be more than max_completion_length"):
        told(tmp_path, completions, [1.0, 0.0], max_teacher_length=8)


@pytest.mark.parametrize("seed", range(5))
def test_no_teachers_sequence_is_longer_than_the_bound(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    completions = [[draw.randrange(7, 47) for _ in range(draw.randrange(0, 8))] + [EOS] for _ in range(8)]
    rewards = [float(draw.random() < 0.5) for _ in completions]
    bound = draw.randrange(9, 20)
    options = {"max_teacher_length": bound, "shorten_solution": draw.random() < 0.5, "max_steps": 1}
    trainer, batch = told(tmp_path, completions, rewards, method=draw.choice(["srpo", "sdpo"]), **options)
    assert all(length <= bound for length in teacher_lengths(batch))
    trainer.train()
    assert torch.tensor(curve(trainer)).isfinite().all()
