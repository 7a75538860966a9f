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

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "trainers.md"
README = ROOT / "README.md"


class TinyModel(nn.Module):
    """With the two attributes of a transformers model that the lines use."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 6)
        self.lm_head = nn.Linear(6, 13, bias=False)

    def model(self, ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.embedding(ids).cumsum(1))


CONFIGS = [sk.SRPOConfig(), sk.SRPOConfig(temperature=0.7, logit_scale=0.5, softcap=2.0, dw_beta=3.0)]


@pytest.mark.parametrize("config", CONFIGS, ids=["default", "transformed"])
def test_the_lines_for_a_loop_of_ones_own(config: sk.SRPOConfig) -> None:
    (lines,) = re.findall(r"```python\n(routing = .*?)```", DOCUMENT.read_text(), re.DOTALL)
    rewards, response_ids = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.randint(13, (4, 5))
    names: dict[str, Any] = {
        "sk": sk,
        "torch": torch,
        "config": config,
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
        config=config,
    )
    assert names["out"].loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert names["model"].lm_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("config", CONFIGS, ids=["default", "transformed"])
def test_the_normalizers_of_readme_are_those_of_the_loss(config: sk.SRPOConfig) -> None:
    (lines,) = re.findall(r"```python\n(teacher = .*?\nnorms = .*?\n)", README.read_text())
    routed = torch.tensor([True, False, True])
    names: dict[str, Any] = {
        "sk": sk,
        "config": config,
        "teacher_hidden": 2.0 * torch.randn(3, 5, 6),
        "ema_model": TinyModel(),
        "response_mask": torch.rand(3, 5) < 0.7,
        "routing": sk.Routing(routed, torch.tensor([1, -1, 1]), ~routed),
    }
    exec(lines, names)
    out = sk.srpo_loss(
        torch.randn(3, 5, 6),
        names["ema_model"].lm_head.weight,
        torch.randint(13, (3, 5)),
        advantages=torch.ones(3),
        mask=names["response_mask"],
        sdpo_mask=routed,
        teacher_hidden=names["teacher_hidden"],
        normalizers=names["norms"],
        config=config,
    )
    assert sk.summarize_metrics(out.metrics)["srpo/dw_weight_mean"] == pytest.approx(1.0, rel=1e-5)
