"""The self-teacher of the trainer, as a part of its checkpoints, and what it reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from srpo_kernels.integrations.transformers import AverageTeacher

FILE_NAME = "srpo_teacher.safetensors"


class Teacher(TrainerCallback):
    """The moving average of a model, updated after each optimizer step, or the model as it is.

    Args:
        model: the trained model, not wrapped for distribution.
        rate: of an `AverageTeacher`; None for the current parameters.
    """

    def __init__(self, model: Any, rate: float | None) -> None:
        self._average = None if rate is None else AverageTeacher(model, rate)
        self.model: Any = model if self._average is None else self._average

    def averages(self) -> dict[str, Tensor]:
        """The average of each trained parameter, by its name in the model; empty with the current parameters."""
        return {} if self._average is None else self._average.state_dict()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Move the averages towards the model."""
        if self._average is not None:
            self._average.update()

    def save(self, folder: Path) -> None:
        """Write the averages, if there are any, into a checkpoint."""
        if self._average is not None:
            averages = {name: average.contiguous() for name, average in self.averages().items()}
            save_file(averages, folder / FILE_NAME)

    def load(self, folder: Path) -> None:
        """Read them again; raises ValueError where a checkpoint has none, or those of other parameters."""
        if self._average is None:
            return
        path = folder / FILE_NAME
        if not path.exists():
            raise ValueError(
                f"resume_from_checkpoint must be a checkpoint of SRPOTrainer with teacher_model_kind='ema', "
                f"{path} does not exist"
            )
        self._average.load_state_dict(load_file(path))


def teacher_prompt(prompt: Any, solution: str, template: str) -> Any:
    """A prompt, text or conversation, that shows a correct solution.

    In a conversation the last message, which must be the user's and text, is replaced; the ones before it stay.
    """
    if isinstance(prompt, str):
        return template.format(prompt=prompt, solution=solution)
    *earlier, last = prompt
    if last["role"] != "user" or not isinstance(last["content"], str):
        raise ValueError(
            "prompt must end with a user message whose content is text, for the teacher to see a solution there, "
            f"got role {last['role']!r} and content of type {type(last['content']).__name__}"
        )
    return [*earlier, {**last, "content": template.format(prompt=last["content"], solution=solution)}]


def pad_left(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, ``[B, P]`` int64 each."""
    length = max(len(sequence) for sequence in sequences)
    ids = [[pad_id] * (length - len(sequence)) + list(sequence) for sequence in sequences]
    mask = [[0] * (length - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
