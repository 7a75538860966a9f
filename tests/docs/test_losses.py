"""docs/losses.md has every name that there is to choose, and its table is that of the registry."""

from __future__ import annotations

import pytest
import torch

import reference
import srpo_kernels as sk
from srpo_kernels.losses.options import DISTILLATION_MODES, KL_TYPES, REDUCTIONS, TOPK_OF
from srpo_kernels.losses.rows import STUDENT, TEACHER
from srpo_kernels.rows.spec import DIVERGENCES
from tests.inputs import head_inputs
from tools.losses.table import DOCUMENT, MARKER, policy_losses

TEXT = DOCUMENT.read_text()


def test_the_table_is_that_of_the_registry() -> None:
    written = TEXT.split(f"<!-- {MARKER} -->")[1].split(f"<!-- /{MARKER} -->")[0]
    assert written.strip() == policy_losses().strip(), "python -m tools.losses writes it again"


@pytest.mark.parametrize(
    "name", [*KL_TYPES, *REDUCTIONS, *DIVERGENCES, *DISTILLATION_MODES, *TOPK_OF, *STUDENT, *TEACHER]
)
def test_every_name_is_there(name: str) -> None:
    assert f"`{name}`" in TEXT or f'"{name}"' in TEXT


def test_a_hard_cross_entropy_term_beside_a_divergence() -> None:
    line = TEXT.split("A hard cross-entropy term beside a divergence")[1].split("`")[1]
    inputs = head_inputs(0, (4, 6), 8, 33, teacher_size=5)
    hidden = inputs["hidden"].requires_grad_()
    loss = sk.fused_loss(**inputs, objective=lambda rows: eval(line, {"rows": rows})).loss
    stats = reference.token_stats(**inputs)
    assert stats.divergence is not None
    expected = stats.divergence.sum() - 0.1 * stats.log_probs.sum()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0.0)
    actual, right = (torch.autograd.grad(x, hidden)[0] for x in (loss, expected))
    torch.testing.assert_close(actual, right, rtol=1e-9, atol=1e-12)
