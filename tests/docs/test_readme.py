"""README's first lines and those for a loss of one's own run, and it has every name that there is to choose."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import reference
import srpo_kernels as sk
from srpo_kernels.losses.options import LOSS_TYPES
from srpo_kernels.rows.spec import DIVERGENCES

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def block(word: str) -> str:
    (lines,) = (lines for lines in BLOCKS if word in lines)
    return lines


def names() -> dict[str, Any]:
    hidden, teacher_hidden = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    model, ema_model = (torch.nn.ModuleDict({"lm_head": torch.nn.Linear(6, 13, False).double()}) for _ in range(2))
    return {
        "sk": sk,
        "hidden": hidden.requires_grad_(),
        "teacher_hidden": teacher_hidden,
        "model": model,
        "ema_model": ema_model,
        "response_ids": torch.randint(13, (4, 5)),
        "response_mask": torch.rand(4, 5) < 0.8,
        "advantages": torch.randn(4, dtype=torch.float64),
        "old_log_probs": -3.0 + torch.randn(4, 5, dtype=torch.float64),
    }


def test_the_first_lines_run_as_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    exec(BLOCKS[0], {})
    shown = README.split(BLOCKS[0])[1].split("```\n")[2]
    assert capsys.readouterr().out == shown


def test_the_lines_of_a_loss_of_ones_own() -> None:
    given = names()
    exec(block("fused_loss("), given)
    weight, mask = given["model"].lm_head.weight, given["response_mask"]
    gradients = [given["hidden"].grad, weight.grad]
    stats = reference.token_stats(
        given["hidden"],
        weight,
        given["response_ids"],
        mask=mask,
        teacher_hidden=given["teacher_hidden"],
        teacher_weight=given["ema_model"].lm_head.weight,
    )
    assert stats.divergence is not None
    ratio = (stats.log_probs - given["old_log_probs"]).exp()
    losses = 0.5 * stats.divergence - ratio * given["advantages"][:, None] - 0.01 * stats.entropy
    expected = (losses * mask).sum() / mask.sum()
    torch.testing.assert_close(gradients, list(torch.autograd.grad(expected, [given["hidden"], weight])))


def test_the_lines_of_a_policy_loss_with_a_name() -> None:
    given = names()
    try:
        exec(block("register_policy_loss("), given)
        arguments = [given[name] for name in ("hidden", "response_ids", "advantages", "old_log_probs")]
        hidden, ids, advantages, old_log_probs = arguments
        rows = {"advantages": advantages, "old_log_probs": old_log_probs, "config": given["config"]}
        out = sk.srpo_loss(hidden, given["model"].lm_head.weight, ids, **rows)
    finally:
        sk.POLICY_LOSSES.pop("floored", None)
    ratio = (out.log_probs - old_log_probs).exp()
    torch.testing.assert_close(out.loss, (-advantages[:, None] * ratio.clamp(min=0.2)).mean())


# The types of what functions return or hand over are in their docstrings.
FUNCTIONS = [name for name in sk.__all__ if name.islower()]
OTHERS = ["SRPOConfig", "SRPOLoss", "Normalizers", "POLICY_LOSSES"]


@pytest.mark.parametrize("name", [*LOSS_TYPES, *DIVERGENCES, *FUNCTIONS, *OTHERS])
def test_a_name_to_choose_is_in_readme(name: str) -> None:
    assert f"`{name}`" in README
