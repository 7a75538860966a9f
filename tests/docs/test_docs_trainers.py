"""The lines of docs/trainers.md for a loop that owns its loss run, and give the loss that they promise."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import srpo_kernels as sk

ROOT = Path(__file__).parents[2]
MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
# Columns of padding before each prompt of the model and of the teacher.
PADDING, TEACHER_PADDING = (0, 2, 1, 1), (2, 0, 3, 1)


class TinyModel(nn.Module):
    """With the two attributes of a transformers model that the lines use; what it computes depends on positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(13, 6), nn.Embedding(20, 6)
        self.lm_head = nn.Linear(6, 13, bias=False)

    def model(self, ids: Tensor, *, attention_mask: Tensor, position_ids: Tensor) -> SimpleNamespace:
        embedded = self.embedding(ids) + self.positions(position_ids)
        return SimpleNamespace(last_hidden_state=(embedded * attention_mask[..., None]).cumsum(1))


CONFIGS = [sk.SRPOConfig(), sk.SRPOConfig(temperature=0.7, logit_scale=0.5, softcap=2.0, dw_beta=3.0)]


def left_padded(prompt_length: int, padding: tuple[int, ...], response_ids: Tensor) -> tuple[Tensor, Tensor]:
    ids = torch.cat([torch.randint(13, (4, prompt_length)), response_ids], 1)
    prompt_mask = torch.arange(prompt_length) >= torch.tensor(padding)[:, None]
    return ids, torch.cat([prompt_mask, MASK], 1).long()


def hidden_alone(model: TinyModel, ids: Tensor, mask: Tensor, prompt_length: int) -> Tensor:
    """Row by row, without padding before the prompt."""
    rows = []
    for row, start in zip(ids, mask.argmax(1).tolist(), strict=True):
        tokens = row[None, start:]
        positions = torch.arange(tokens.shape[1])[None]
        hidden = model.model(tokens, attention_mask=torch.ones_like(tokens), position_ids=positions).last_hidden_state
        rows.append(hidden[:, prompt_length - start - 1 : -1])
    return torch.cat(rows)


@pytest.mark.parametrize("config", CONFIGS, ids=["default", "transformed"])
def test_the_lines_for_a_loop_of_ones_own(config: sk.SRPOConfig) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/trainers.md").read_text(), re.DOTALL)
    (lines,) = (block for block in blocks if "route_samples(" in block and "sk.srpo_loss(" in block)
    rewards, response_ids = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.randint(13, (4, 5))
    model, teacher = TinyModel(), TinyModel()
    input_ids, attention_mask = left_padded(3, PADDING, response_ids)
    teacher_ids, teacher_attention_mask = left_padded(4, TEACHER_PADDING, response_ids)
    names: dict[str, Any] = {
        "sk": sk,
        "torch": torch,
        "config": config,
        "world_size": 1,
        "rewards": rewards,
        "group_ids": torch.tensor([0, 0, 1, 1]),
        "mask": MASK,
        "response_mask": MASK,
        "response_ids": response_ids,
        "prompt_length": 3,
        "teacher_prompt_length": 4,
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "teacher_ids": teacher_ids,
        "teacher_attention_mask": teacher_attention_mask,
        "model": model,
        "teacher": teacher,
        "ema_model": teacher,
    }
    exec(lines, names)
    expected = sk.srpo_loss(
        hidden_alone(model, input_ids, attention_mask, 3),
        model.lm_head.weight,
        response_ids,
        advantages=sk.group_advantages(rewards, names["group_ids"]),
        mask=MASK,
        sdpo_mask=torch.tensor([False, True, False, False]),
        teacher_hidden=hidden_alone(teacher, teacher_ids, teacher_attention_mask, 4),
        teacher_weight=teacher.lm_head.weight,
        config=names["config"],
    )
    assert names["out"].loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert names["model"].lm_head.weight.grad.abs().sum() > 0
