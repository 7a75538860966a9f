"""The self-teacher: the model itself, with the moving average of its trained parameters or with the current ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call
from transformers import TrainerCallback

FILE_NAME = "srpo_teacher.safetensors"


class Teacher(TrainerCallback):
    """Runs a model with averaged parameters: ``average += rate * (parameter - average)`` after each optimizer step.

    Only parameters that are trained have an average, so that LoRA pays for its adapters alone; it is kept in fp32 or
    wider, where small steps are not rounded away. There is no second model: a call swaps the parameters in.

    Args:
        model: the trained model, not wrapped for distribution.
        rate: in (0, 1]; None for the current parameters.
    """

    def __init__(self, model: Any, rate: float | None) -> None:
        self.model = model
        self.rate = rate
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad and rate is not None}
        self._trained = trained
        self._averages = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for name, p in trained.items()
        }

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Any:
        """The model's forward without dropout, gradient or checkpointing."""
        parameters = {name: self._averages[name].to(p.dtype) for name, p in self._trained.items()}
        training = self.model.training
        self.model.eval()
        try:
            return functional_call(self.model, parameters, kwargs=inputs)
        finally:
            self.model.train(training)

    def value(self, parameter: Tensor) -> Tensor:
        """The teacher's value of a parameter of the model, in its dtype, detached."""
        value = parameter.detach()
        for name, trained in self._trained.items():
            if trained is parameter:
                value = self._averages[name].to(value.dtype)
        return value

    def averages(self) -> dict[str, Tensor]:
        """The average of each trained parameter, by its name in the model; empty with the current parameters."""
        return dict(self._averages)

    @torch.no_grad()
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Move the averages towards the model."""
        for name, average in self._averages.items():
            average.lerp_(self._trained[name].to(average), self.rate)

    def save(self, folder: Path) -> None:
        """Write the averages, if there are any, into a checkpoint."""
        if self._averages:
            save_file({name: average.contiguous() for name, average in self._averages.items()}, folder / FILE_NAME)

    def load(self, folder: Path) -> None:
        """Read them again; raises ValueError where a checkpoint has none, or those of other parameters."""
        if not self._averages:
            return
        path = folder / FILE_NAME
        if not path.exists():
            raise ValueError(
                f"resume_from_checkpoint must be a checkpoint of SRPOTrainer with teacher_model_kind='ema', "
                f"{path} does not exist"
            )
        saved = load_file(path)
        if saved.keys() != self._averages.keys():
            raise ValueError(f"{path} must hold the averages of the trained parameters, got those of others")
        for name, average in self._averages.items():
            average.copy_(saved[name])


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
