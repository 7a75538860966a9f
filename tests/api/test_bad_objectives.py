"""``fused_loss``: what is refused, of its arguments and of an objective, and by what name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import srpo_kernels as sk
from tests.api.test_fused_loss import actual, batch, everything, extras


def changes_inputs(rows: Any) -> Tensor:
    rows.advantages.mul_(2.0)
    return -rows.log_probs * rows.advantages


def changes_statistics(rows: Any) -> Tensor:
    rows.log_probs.detach().mul_(2.0)
    return -rows.log_probs


PARAMETER = torch.ones(3, requires_grad=True)

REFUSED: list[tuple[Any, type[Exception], str]] = [
    (lambda rows: rows.log_probs.sum(), ValueError, r"must return one loss per row, \[n\] = \[\d+\], got \[\]"),
    (lambda rows: rows.log_probs[:1], ValueError, "must return one loss per row"),
    (lambda rows: 1.0, TypeError, "must return a tensor .* got float"),
    (lambda rows: rows.log_probs.float(), TypeError, "must return torch.float64"),
    (lambda rows: rows.advantages * 2, ValueError, "must carry gradient to one of rows.log_probs"),
    (lambda rows: rows.log_probs.detach(), ValueError, "must carry gradient"),
    (lambda rows: rows.log_probs * PARAMETER.sum(), ValueError, r"tensor of shape \[3\] that requires a gradient"),
    (changes_inputs, ValueError, r"changes_inputs must not change its rows in place.*\['advantages'\]"),
    (changes_statistics, ValueError, r"must not change its rows in place.*\['log_probs'\]"),
    (lambda rows: rows.log_probs * torch.nan, ValueError, r"is NaN, or its gradient is, for \d+ of \d+ rows"),
    (lambda rows: torch.where(rows.clipped, 0.0, rows.log_probs) + (rows.log_probs * 0).sqrt(), ValueError, "is NaN"),
    (lambda rows: rows.support_log_probs.sum(1), ValueError, r"reads \['support_log_probs'\] of its rows"),
    (lambda rows: rows.log_probs * rows.rewards, AttributeError, "rows have no 'rewards'.*advantages"),
    (lambda rows: rows.sequence_mean(rows.log_probs), ValueError, "needs whole_sequences=True"),
]


@pytest.mark.parametrize(("function", "error", "message"), REFUSED, ids=range(len(REFUSED)))
def test_a_bad_objective_is_named(function: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        actual(batch(), extras(), function, "torch")
    name = function.__name__
    assert name in str(raised.value) or any(name in note for note in getattr(raised.value, "__notes__", []))


def test_nan_of_the_model_is_no_fault_of_the_objective() -> None:
    inputs = batch()
    inputs["hidden"][3] = torch.nan
    inputs["mask"][3] = True
    results, _ = actual(inputs, extras(), everything, "torch")
    assert results[0].isnan()


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"objective": 3}, TypeError, "objective must be a function or the name"),
    ({"objective": "ppo"}, ValueError, "objective must be a function or one of"),
    ({"objective": "grpo"}, ValueError, "inputs of the policy loss 'grpo' must be 'advantages'"),
    ({"inputs": [torch.ones(23)]}, TypeError, "inputs must be a mapping"),
    ({"inputs": {"log_probs": torch.ones(23)}}, ValueError, "inputs must not have the names"),
    ({"inputs": {"has_teacher": torch.ones(23)}}, ValueError, "inputs must not have the names"),
    ({"inputs": {"_a": torch.ones(23)}}, ValueError, "identifiers"),
    ({"inputs": {3: torch.ones(23)}}, ValueError, "identifiers"),
    ({"inputs": {"a": 1.0}}, TypeError, r"inputs\['a'\] must be a torch.Tensor"),
    ({"inputs": {"a": torch.ones(22)}}, ValueError, r"inputs\['a'\] must have shape"),
    ({"inputs": {"a": torch.ones(23, requires_grad=True)}}, ValueError, r"inputs\['a'\] must not require a gradient"),
    ({"teacher_mask": torch.ones(22, dtype=torch.bool)}, ValueError, "teacher_mask must have shape"),
    ({"teacher_mask": torch.ones(23)}, TypeError, "teacher_mask must be bool"),
    ({"teacher_hidden": None, "teacher_mask": torch.ones(23) > 0}, ValueError, "teacher_mask needs teacher_hidden"),
    ({"whole_sequences": True}, ValueError, "sequence_ids is required"),
    ({"whole_sequences": 1}, TypeError, "whole_sequences must be a bool"),
    ({"config": 3}, TypeError, "config must be an SRPOConfig"),
    ({"workspace_bytes": 3}, ValueError, "workspace_bytes must be at least"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=range(len(BAD)))
def test_a_bad_argument_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    call = batch() | {"objective": lambda rows: -rows.log_probs} | changes
    with pytest.raises(error, match=message):
        sk.fused_loss(**call)


def test_a_divergence_needs_a_teacher() -> None:
    call = {key: value for key, value in batch().items() if not key.startswith("teacher")}
    with pytest.raises(ValueError, match=r"reads rows.divergence, which needs teacher_hidden"):
        sk.fused_loss(**call, objective=lambda rows: rows.divergence)
