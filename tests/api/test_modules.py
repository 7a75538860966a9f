"""``SRPOLoss`` is ``srpo_loss`` with its configuration bound."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from srpo_kernels import SRPOConfig, SRPOLoss, srpo_loss
from tests.comparison import assert_same, run_loss
from tests.inputs import loss_inputs


@pytest.mark.parametrize("rows", [(6, 7), (23,)], ids=["padded", "packed"])
@pytest.mark.parametrize("options", [{}, {"loss_type": "gspo", "dw_beta": 3.0, "reduction": "sequence"}], ids=str)
def test_is_the_function(options: dict[str, Any], rows: tuple[int, ...]) -> None:
    config, inputs = SRPOConfig(**options), loss_inputs(0, rows, teacher_size=5)
    module = SRPOLoss(config, workspace_bytes=10_000)
    assert_same(run_loss(module, inputs), run_loss(srpo_loss, inputs, config=config, workspace_bytes=10_000), 0.0)


def test_takes_the_first_three_arguments_by_position() -> None:
    inputs = loss_inputs(0, (6, 7))
    expected = SRPOLoss()(**inputs).loss
    positional = [inputs.pop(name) for name in ("hidden", "weight", "target_ids")]
    torch.testing.assert_close(SRPOLoss()(*positional, **inputs).loss, expected, rtol=0, atol=0)


def test_defaults_to_the_default_configuration() -> None:
    assert SRPOLoss().config == SRPOConfig()


def test_has_no_state_and_survives_a_copy() -> None:
    module = SRPOLoss(SRPOConfig(dw_beta=2.0), backend="torch", workspace_bytes=10_000)
    assert not list(module.parameters())
    assert not module.state_dict()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert (other.config, other.backend, other.workspace_bytes) == (module.config, "torch", 10_000)


def test_shows_its_configuration() -> None:
    shown = repr(SRPOLoss(SRPOConfig(dw_beta=2.5), backend="torch"))
    assert "dw_beta=2.5" in shown
    assert "backend='torch'" in shown
