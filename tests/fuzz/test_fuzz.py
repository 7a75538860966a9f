"""``python -m tests.fuzz``: its first cases pass, and what is wrong is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from srpo_kernels.engine import srpo
from srpo_kernels.losses import derived
from srpo_kernels.losses.registry import POLICY_LOSSES
from tests.fuzz.__main__ import main
from tests.fuzz.draw import draw_case
from tests.fuzz.judge import judge
from tests.strategies import each_backend

_ENOUGH = 1000


@each_backend
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
def test_random_calls(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--backend", backend, "--cases", "60"]) == 0, capsys.readouterr().out
    assert "60 cases, 0 failed" in capsys.readouterr().out


def wrong_coefficient(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(POLICY_LOSSES["sapo"].options, "tau_negative", 1.06)


def forgotten_row(patch: pytest.MonkeyPatch) -> None:
    original = srpo.order_rows

    def order_rows(valid: Tensor, *rest: Any, **options: Any) -> Any:
        ordered = original(valid, *rest, **options)
        return ordered._replace(order=ordered.order._replace(taught=ordered.order.taught[1:]))

    patch.setattr(srpo, "order_rows", order_rows)


def gradient_of_a_mean(patch: pytest.MonkeyPatch) -> None:
    original = derived.sampled_divergence

    def sampled_divergence(log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        # The value is right.
        value = original(log_probs, teacher_log_probs)
        return value.detach() + (value - value.detach()) * (1 + 1e-4)

    patch.setattr(derived, "sampled_divergence", sampled_divergence)


@pytest.mark.parametrize(
    ("plant", "where"),
    [
        (wrong_coefficient, {"loss_type": "sapo"}),
        (forgotten_row, {}),
        (gradient_of_a_mean, {"distillation_mode": "sampled"}),
    ],
)
def test_a_planted_fault_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], where: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among the cases with these options: no other runs what is wrong."""

    def passes(seed: int) -> bool:
        case = draw_case(seed, "torch")
        return not where.items() <= case.options.items() or all(finding.passed for finding in judge(case))

    plant(monkeypatch)
    found = next((seed for seed in range(_ENOUGH) if not passes(seed)), None)
    assert found is not None
    monkeypatch.undo()
    assert passes(found)


def test_a_case_is_repeated_by_its_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "7"]) == 0
    assert "--only 7: {" in capsys.readouterr().out
    first, second = draw_case(7, "torch"), draw_case(7, "torch")
    assert first.options == second.options
    for name, value in first.inputs.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(second.inputs[name], value, rtol=0, atol=0, equal_nan=True)


def test_a_failure_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    forgotten_row(monkeypatch)
    assert main(["--cases", "20"]) == 1
    assert "FAILED --only" in capsys.readouterr().out
