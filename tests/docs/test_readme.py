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


def test_the_first_lines_run_as_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    exec(BLOCKS[0], {})
    shown = README.split(BLOCKS[0])[1].split("```\n")[2]
    assert capsys.readouterr().out == shown


def test_the_lines_of_a_loss_of_ones_own() -> None:
    given: dict[str, Any] = {}
    exec(BLOCKS[0], given)
    hidden, weight = given["hidden"], given["weight"]
    hidden.grad = weight.grad = None
    exec(block("fused_loss("), given)
    stats = reference.token_stats(
        hidden, weight, given["response_ids"], teacher_hidden=given["teacher_hidden"], teacher_weight=weight.detach()
    )
    assert stats.divergence is not None
    ratio = (stats.log_probs - given["out"].log_probs).exp()
    losses = 0.5 * stats.divergence - ratio * given["advantages"][:, None] - 0.01 * stats.entropy
    expected = torch.autograd.grad(losses.mean(), [hidden, weight])
    torch.testing.assert_close([hidden.grad, weight.grad], list(expected), rtol=1e-4, atol=1e-7)


def test_the_lines_of_a_policy_loss_with_a_name() -> None:
    hidden, weight, advantages = torch.randn(4, 5, 6), torch.randn(13, 6), torch.randn(4)
    ids, old_log_probs = torch.randint(13, (4, 5)), -3.0 + torch.randn(4, 5)
    given: dict[str, Any] = {"sk": sk}
    try:
        exec(block("register_policy_loss("), given)
        out = sk.srpo_loss(
            hidden, weight, ids, advantages=advantages, old_log_probs=old_log_probs, config=given["config"]
        )
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
