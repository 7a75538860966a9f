"""Gradients of dlogits in bf16: what their rounding may add, and no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import reference
from srpo_kernels import SRPOConfig, srpo_loss
from srpo_kernels.verify.cases import cases
from srpo_kernels.verify.checks import parity
from srpo_kernels.verify.inputs import Size
from srpo_kernels.verify.rounding import GradientTerms
from tests.comparison import assert_as_accurate, condition_of, run_loss
from tests.inputs import cast, loss_inputs
from tests.mixed_products import WHERE, Operators
from tests.rows.test_mixed_products import OPTIONS

# A GPU's operators are here in the place of a CPU's own.
pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_rounded_dlogits_allow_holds_alone_and_is_not_met_twice(
    operators: Operators, options: dict[str, Any]
) -> None:
    config, terms = SRPOConfig(**options), GradientTerms()
    inputs = cast(loss_inputs(1, (4, 9), teacher_size=5, config=config), torch.bfloat16)
    exact = run_loss(reference.srpo_loss, cast(inputs, torch.float64), config=config, project=terms)
    actual = {name: x.double() for name, x in run_loss(srpo_loss, inputs, config=config).items()}
    bounds = terms.rounding(inputs["weight"])
    if operators.version == "before Ampere":
        assert not any(bounds.values())
        return
    # Plain torch without an error adds nothing to what is allowed.
    how = {"share": 1.0 / 36, "condition": condition_of(config, exact), "rounding": bounds}
    assert_as_accurate(actual, exact, exact, **how)
    for name, bound in bounds.items():
        planted = actual[name] + 2 * bound * (actual[name] - exact[name]).sign()
        with pytest.raises(AssertionError, match=name):
            assert_as_accurate(actual | {name: planted}, exact, exact, **how)


def test_verify_allows_for_the_rounding_of_dlogits(operators: Operators, monkeypatch: pytest.MonkeyPatch) -> None:
    # Sums of dlogits that cancel: an H100 was as far off.
    chosen = {("vocabulary", "33"), ("chunks of rows", "vespo"), ("form of the inputs", "several teachers")}
    found = [x for x in cases(Size(6, 5, 1009), large=False, realistic=False) if (x.group, x.name) in chosen]

    def passed() -> list[bool]:
        return [check.passed for case in found for check in parity(case, torch.bfloat16, ["torch"], WHERE)]

    assert len(passed()) >= len(chosen) and all(passed())
    monkeypatch.setattr(GradientTerms, "rounding", lambda terms, weight: {})
    assert all(passed()) == (operators.version == "before Ampere")
