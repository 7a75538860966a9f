"""Where a question has several right replies: what a teacher that is shown one holds of another."""

from __future__ import annotations

import random
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from torch import Tensor

from benchmarks.results import environment
from studies.learning.base import load_base, make_tokenizer
from studies.learning.options import Choices
from studies.learning.tasks import Family, draw, with_solution

_QUESTIONS = 200


def choices(options: Choices) -> None:
    """What ``Choices`` describes."""
    models = {name: load_base(options.folder / name).eval() for name in options.models}
    lines = [{"model": name} | held(model, options.family) for name, model in models.items()]
    place = environment(torch.device("cpu"), torch.get_num_threads())
    table = pd.DataFrame(lines).assign(**place)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out, index=False, float_format="%.4g")
    Console(soft_wrap=True).print(table[list(lines[0])].to_string(index=False))


def held(model: Any, family: Family) -> dict[str, float]:
    """Means over questions: the probability of a right token where right replies part, and of the reply, in nats."""
    source, tokenizer = random.Random(0), make_tokenizer()
    lines = []
    for _ in range(_QUESTIONS):
        problem = draw(family, source, held_out=False)
        own, other = problem.solve(source), problem.solve(source)
        if own == other:
            continue
        parting = next(place for place, pair in enumerate(zip(own, other, strict=True)) if len(set(pair)) > 1)
        alone = _log_probs(model, tokenizer, problem.question, own)
        shown = _log_probs(model, tokenizer, with_solution(problem.question, other), own)
        lines.append(
            {
                "alone": alone[parting].exp().item(),
                "shown_another": shown[parting].exp().item(),
                "reply_alone": alone.sum().item(),
                "reply_shown_another": shown.sum().item(),
            }
        )
    means: dict[str, float] = pd.DataFrame(lines).mean().to_dict()
    return {"questions": len(lines)} | means


@torch.no_grad()
def _log_probs(model: Any, tokenizer: Any, question: str, reply: str) -> Tensor:
    """Of the tokens of ``reply`` and its end, ``[T]``."""
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)).input_ids
    ids = tokenizer(reply + tokenizer.eos_token).input_ids
    logits: Tensor = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
