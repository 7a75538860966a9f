"""``srpo_loss`` against the oracle: loss, metrics, log-probs and every gradient, for every option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given

import reference
from srpo_kernels import SRPOConfig, srpo_loss
from srpo_kernels.losses.options import KL_TYPES, LOSS_TYPES
from srpo_kernels.rows.spec import DIVERGENCES
from tests.comparison import assert_as_accurate, assert_same, run_loss
from tests.inputs import cast, loss_inputs
from tests.parity import check_loss
from tests.strategies import LOSS_OPTIONS, Case, loss_cases, thorough

LOW_PRECISION = [torch.float32, torch.bfloat16, torch.float16]


@thorough
@given(loss_cases())
def test_fp64_parity(case: Case) -> None:
    actual = run_loss(srpo_loss, case.inputs, case.leaves, workspace_bytes=case.workspace_bytes, **case.options)
    assert_same(actual, run_loss(reference.srpo_loss, case.inputs, case.leaves, **case.options), 1e-9)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@thorough
@given(case=loss_cases())
def test_low_precision_is_as_accurate_as_plain_torch_with_fp32_logits(dtype: torch.dtype, case: Case) -> None:
    check_loss(case, dtype, "torch")


EACH_OPTION: list[dict[str, Any]] = [
    {},
    *({"loss_type": name} for name in LOSS_TYPES),
    {"epsilon_low": 0.0, "epsilon_high": 0.0},
    {"delta": 1.5},
    {"dual_clip": 1.2},
    {"loss_type": "gspo", "delta": 1.1, "dual_clip": 1.05},
    {"log_ratio_clamp": 0.3},
    {"log_ratio_clamp": None},
    *({"kl_coef": 0.1, "kl_type": name} for name in KL_TYPES),
    *({"loss_type": name, "loss_options": options} for name, choices in LOSS_OPTIONS.items() for options in choices),
    {"entropy_coef": 0.1},
    {"entropy_coef": -0.1, "softcap": 5.0},
    {"divergence": "forward_kl"},
    {"divergence": "reverse_kl"},
    {"alpha": 0.1},
    {"distillation_mode": "topk"},
    {"distillation_mode": "topk", "topk": 3},
    {"distillation_mode": "topk", "topk": 3, "add_tail": False},
    {"distillation_mode": "topk", "topk": 3, "divergence": "reverse_kl"},
    {"distillation_mode": "topk", "topk": 33, "divergence": "forward_kl"},
    {"distillation_mode": "topk", "topk": 3, "topk_of": "teacher"},
    {"distillation_mode": "topk", "topk": 3, "topk_of": "teacher", "add_tail": False, "divergence": "forward_kl"},
    {"distillation_mode": "sampled"},
    {"distillation_is_clip": None},
    {"dw_beta": 0.0},
    {"dw_beta": 30.0},
    {"temperature": 0.7},
    {"logit_scale": 0.5},
    {"softcap": 5.0},
    {"softcap": 5.0, "distillation_mode": "topk", "topk": 3},
    {"reduction": "sequence"},
    {"reduction": "constant", "max_length": 9},
    {"count_inactive": True},
    {"count_entropy": True},
    {"count_entropy": True, "count_inactive": True, "loss_type": "gspo"},
]


@pytest.mark.parametrize("options", EACH_OPTION, ids=str)
@pytest.mark.parametrize("rows", [(6, 7), (31,)], ids=["padded", "packed"])
def test_each_option(options: dict[str, Any], rows: tuple[int, ...]) -> None:
    config = SRPOConfig(**options)
    inputs = loss_inputs(3, rows, teacher_size=5, spread=2.0, config=config)
    expected = run_loss(reference.srpo_loss, inputs, config=config)
    assert_same(run_loss(srpo_loss, inputs, config=config), expected, 1e-9)


@pytest.mark.parametrize("mode", ["full", "topk", "sampled"])
def test_a_vocabulary_of_several_blocks_and_slabs(mode: str) -> None:
    # Row passes take 2 of the rows at a time, and the bf16 weight is widened in 2 slabs.
    config = SRPOConfig(distillation_mode=mode, entropy_coef=0.1, softcap=20.0)
    inputs = cast(loss_inputs(0, (3, 3), 65, 131_073, config=config), torch.bfloat16)
    actual, naive = (run_loss(f, inputs, config=config) for f in (srpo_loss, reference.srpo_loss))
    exact = run_loss(reference.srpo_loss, cast(inputs, torch.float64), config=config)
    assert_as_accurate(actual, naive, exact, share=1.0 / 9)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("mode", "gap"), [("full", 150.0), ("topk", 80.0), ("sampled", 150.0)])
def test_logits_whose_exponentials_leave_the_range_of_fp32(mode: str, gap: float, divergence: str) -> None:
    config = SRPOConfig(distillation_mode=mode, topk=2, divergence=divergence, dw_beta=0.0)
    inputs = {
        "hidden": torch.tensor([[[gap, gap - 1, 0.0, 1.0]]]),
        "weight": torch.eye(4),
        "target_ids": torch.tensor([[0]]),
        "sdpo_mask": torch.tensor([True]),
        "teacher_hidden": torch.tensor([[[0.0, 1.0, 2.0, -gap]]]),
    }
    actual, naive = (run_loss(f, inputs, config=config) for f in (srpo_loss, reference.srpo_loss))
    exact = run_loss(reference.srpo_loss, cast(inputs, torch.float64), config=config)
    assert all(x.isfinite().all() for x in actual.values())
    assert_as_accurate(actual, naive, exact)


def test_rows_that_went_to_nan_are_counted() -> None:
    inputs = loss_inputs(0, (6, 7)) | {"mask": None}
    inputs["sdpo_mask"] = torch.tensor([True, True, False, False, False, False])
    inputs["advantages"] = torch.ones(6, dtype=torch.float64)
    inputs["hidden"][0, 1] = inputs["hidden"][3, 2:4] = torch.nan
    assert srpo_loss(**inputs).metrics["nonfinite_rows"] == 3
    assert reference.srpo_loss(**inputs, config=SRPOConfig()).metrics["nonfinite_rows"] == 3
