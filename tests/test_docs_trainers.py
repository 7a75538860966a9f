"""The lines of docs/trainers.md for a loop that owns its loss run, and give the loss that they promise."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import srpo_kernels as sk

DOCUMENT = Path(__file__).parents[1] / "docs" / "trainers.md"


class TinyModel(nn.Module):
    """With the two attributes of a transformers model that the lines use."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 6)
        self.lm_head = nn.Linear(6, 13, bias=False)

    def model(self, ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.embedding(ids).cumsum(1))


def test_the_lines_for_a_loop_of_ones_own() -> None:
    (lines,) = re.findall(r"```python\n(routing = .*?)```", DOCUMENT.read_text(), re.DOTALL)
    rewards, response_ids = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.randint(13, (4, 5))
    names: dict[str, Any] = {
        "sk": sk,
        "torch": torch,
        "config": sk.SRPOConfig(),
        "world_size": 1,
        "rewards": rewards,
        "group_ids": torch.tensor([0, 0, 1, 1]),
        "mask": torch.rand(4, 5) < 0.7,
        "response_ids": response_ids,
        "prompt_length": 3,
        "teacher_prompt_length": 4,
        "input_ids": torch.cat([torch.randint(13, (4, 3)), response_ids], 1),
        "teacher_ids": torch.cat([torch.randint(13, (4, 4)), response_ids], 1),
        "model": TinyModel(),
        "teacher": TinyModel(),
    }
    exec(lines, names)
    expected = sk.srpo_loss(
        names["hidden"],
        names["model"].lm_head.weight,
        response_ids,
        advantages=sk.group_advantages(rewards, names["group_ids"]),
        mask=names["mask"],
        sdpo_mask=torch.tensor([False, True, False, False]),
        teacher_hidden=names["guided"],
        teacher_weight=names["teacher"].lm_head.weight,
    )
    assert names["out"].loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert names["model"].lm_head.weight.grad.abs().sum() > 0
