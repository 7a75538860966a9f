"""The teacher of the trainer, as a part of its checkpoints, and what it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from srpo_kernels.integrations.transformers import AverageTeacher

FILE_NAME = "srpo_teacher.safetensors"


class Teacher(TrainerCallback):
    """The moving average of a model, the model as it was or as it is, or another one.

    It is made when training begins, or when it is first needed: FSDP2 shards parameters after a trainer is constructed.

    Args:
        kind: ``"ema"``, ``"live"``, ``"frozen"`` or ``"other"``.
        model: returns the trained model, not wrapped for distribution; or the other one.
        rate: of the moving average.
        every: optimizer steps from one update of it to the next.
    """

    def __init__(self, kind: str, model: Callable[[], Any], *, rate: float, every: int) -> None:
        self.kind, self._make, self._rate, self._every = kind, model, rate, every
        self._model: Any = None

    @property
    def model(self) -> Any:
        """What ``teacher_rows`` runs: a model, or an `AverageTeacher`."""
        if self._model is None:
            model = self._make()
            if self.kind in ("ema", "frozen"):
                model = AverageTeacher(model, self._rate if self.kind == "ema" else 0.0)
            self._model = model
        return self._model

    def averages(self) -> dict[str, Tensor]:
        """The average of each trained parameter, by its name in the model; empty without averages."""
        return self.model.state_dict() if isinstance(self.model, AverageTeacher) else {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Take the parameters as they are before the first step."""
        _ = self.model

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the averages towards the model."""
        if self.kind == "ema" and state.global_step % self._every == 0:
            self.model.update()

    def save(self, folder: Path, *, writes: bool) -> None:
        """Write the averages, if there are any, into a checkpoint; every process gathers those that are sharded."""
        averages = {name: average.contiguous() for name, average in self.averages().items()}
        if averages and writes:
            save_file(averages, folder / FILE_NAME)

    def load(self, folder: Path) -> None:
        """Read them again; raises ValueError where a checkpoint has none, or those of other parameters."""
        if not isinstance(self.model, AverageTeacher):
            return
        path = folder / FILE_NAME
        if not path.exists():
            raise ValueError(
                f"resume_from_checkpoint must be a checkpoint of SRPOTrainer with teacher_model_kind={self.kind!r}, "
                f"{path} does not exist"
            )
        self.model.load_state_dict(load_file(path))


def pad_left(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, ``[B, P]`` int64 each."""
    length = max(len(sequence) for sequence in sequences)
    ids = [[pad_id] * (length - len(sequence)) + list(sequence) for sequence in sequences]
    mask = [[0] * (length - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
