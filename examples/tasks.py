"""Verifiable problems of reasoning-gym, easy enough that a small model solves some of them some of the time."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

TaskName = Literal["products", "chain_sum", "lcm", "gcd", "count_bits"]

# Difficulties at which SmolLM2-135M-Instruct, sampled eight times, usually fails some and solves some.
SETTINGS: dict[TaskName, dict[str, int]] = {
    "products": {"min_digits": 1, "max_digits": 1},
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "lcm": {"min_value": 2, "max_value": 12},
    "gcd": {"min_value": 2, "max_value": 12},
    "count_bits": {"max_n": 15},
}

INSTRUCTION = "Reply with the answer only."
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class Problem(NamedTuple):
    """A question as the model sees it, and the task that knows its answer."""

    question: str
    dataset: ProceduralDataset
    entry: dict[str, Any]

    def reward(self, reply: str) -> float:
        """1.0 if the last number of the reply gets the task's full score, else 0.0.

        The scorers also give part of a point to a number that merely contains the answer, 15 for 5. That is not
        correct, and the model must learn neither from it nor towards it.
        """
        numbers = NUMBER.findall(reply)
        return float(bool(numbers) and self.dataset.score_answer(numbers[-1], self.entry) >= 1.0)


def problems(tasks: tuple[TaskName, ...], count: int, seed: int) -> Iterator[Problem]:
    """``count`` problems, from each task in turn."""
    with warnings.catch_warnings():
        # Of a package that reasoning-gym imports.
        warnings.simplefilter("ignore", SyntaxWarning)
        import reasoning_gym

    datasets = [reasoning_gym.create_dataset(task, size=count, seed=seed, **SETTINGS[task]) for task in tasks]
    for index in range(count):
        dataset = datasets[index % len(datasets)]
        entry = dataset[index]
        yield Problem(f"{entry['question']}\n{INSTRUCTION}", dataset, entry)
