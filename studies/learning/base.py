"""The model that every run starts from: a small Qwen3, taught for so long that it solves some of the problems."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from examples.rollouts import encode_chats
from studies.learning.sampling import sample
from studies.learning.tasks import CHARACTERS, Family, Problem, draw, max_reply, with_solution

_SEQUENCES = 64
# Of the examples that show a solution, those that are answered with another one.
_OTHER = 0.2


def make_tokenizer() -> Any:
    """One id per character; a chat is its question and ``=``."""
    words = ["<eos>", *CHARACTERS]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.chat_template = "{{ messages[0]['content'] }}="
    return fast


def make_model(hidden_size: int, layers: int, seed: int) -> Any:
    """A Qwen3 with random weights and an untied head."""
    torch.manual_seed(seed)
    heads = hidden_size // 32
    config = Qwen3Config(
        vocab_size=len(CHARACTERS) + 1,
        hidden_size=hidden_size,
        intermediate_size=11 * hidden_size // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 4, 1),
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def held_out_problems(families: tuple[Family, ...], count: int) -> list[Problem]:
    """The same ``count`` problems for every model, from each family in turn."""
    source = random.Random(0)
    return [draw(families[index % len(families)], source, held_out=True) for index in range(count)]


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, problems: list[Problem], replies: int, *, shown: bool = False) -> list[float]:
    """Of each problem, the share of correct ones among sampled replies at temperature 1; ``shown``: with a solution."""
    source = random.Random(1)
    questions = [
        with_solution(problem.question, problem.solve(source)) if shown else problem.question for problem in problems
    ]
    longest = max(max_reply(problem.family) for problem in problems)
    rollouts = sample(model, tokenizer, questions, replies, longest)
    correct = [problems[index // replies].correct(reply) for index, reply in enumerate(rollouts.replies)]
    return torch.tensor(correct, dtype=torch.float32).view(-1, replies).mean(1).tolist()


def teach(
    model: Any,
    families: tuple[Family, ...],
    *,
    steps: int,
    lr: float,
    seed: int,
    shown: float,
    evaluate_every: int,
    progress: Callable[[int], bool],
) -> None:
    """Supervised training, a share ``shown`` of whose batches shows solutions; true of ``progress`` ends it."""
    tokenizer, source = make_tokenizer(), random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / 100)
        optimizer.zero_grad()
        _supervised_loss(model, tokenizer, families, source, shown).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % evaluate_every == 0 and progress(step):
            return


def held_out_accuracies(model: Any, families: tuple[Family, ...], problems: int, replies: int) -> dict[str, float]:
    """By family, alone and with a solution shown."""
    tokenizer, seen = make_tokenizer(), {}
    for shown in (False, True):
        for family in families:
            own = accuracy(model, tokenizer, held_out_problems((family,), problems), replies, shown=shown)
            seen[f"{family} shown" if shown else family] = sum(own) / len(own)
    return seen


def _supervised_loss(
    model: Any, tokenizer: Any, families: tuple[Family, ...], source: random.Random, share: float
) -> Any:
    """Of a batch in which every question shows a solution, or none does: their lengths differ much."""
    questions, replies = [], []
    shown = source.random() < share
    for index in range(_SEQUENCES):
        problem = draw(families[index % len(families)], source, held_out=False)
        reply = problem.solve(source)
        question = problem.question
        if shown:
            solution = problem.solve(source) if source.random() < _OTHER else reply
            question = with_solution(question, solution)
        questions.append(question)
        replies.append(reply + "<eos>")
    prompt_ids, prompt_mask = encode_chats(tokenizer, questions)
    encoded = tokenizer(replies, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    mask = torch.cat([prompt_mask, encoded.attention_mask.bool()], 1)
    hidden = model.model(
        input_ids=torch.cat([prompt_ids, encoded.input_ids], 1),
        attention_mask=mask.long(),
        position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
        use_cache=False,
    ).last_hidden_state
    logits = model.lm_head(hidden[:, prompt_ids.shape[1] - 1 : -1])
    targets = encoded.input_ids.masked_fill(~encoded.attention_mask.bool(), -100)
    return cross_entropy(logits.flatten(0, 1), targets.flatten())


def load_base(folder: Path) -> Any:
    """The model that ``teach`` made and ``save_pretrained`` kept."""
    disable_progress_bar()
    return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
