"""What a call costs: rows that cannot move a weight nothing, the others 3 or 4 products (design section 3, point 9)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from srpo_kernels import SRPOConfig, srpo_loss, token_stats
from srpo_kernels.engine import srpo, workspace
from srpo_kernels.engine.plan import Plan, make_plan
from srpo_kernels.engine.workspace import row_stride
from srpo_kernels.losses.options import DISTILLATION_MODES
from tests.comparison import assert_same, run_loss, with_leaves
from tests.inputs import LEAVES, Inputs, cast, head_inputs, loss_inputs, policy_rows, workspace_floor
from tests.meters import MemoryMeter, ProductMeter


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans of the calls of ``srpo_loss``."""
    made: list[Plan] = []

    def record(*args: Any, **kwargs: Any) -> Plan:
        made.append(make_plan(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(srpo, "make_plan", record)
    return made


def measured_products(inputs: Inputs, leaves: tuple[str, ...] = LEAVES, **options: Any) -> float:
    """Products of one call, forward and backward, in units of ``H * V``."""
    with ProductMeter() as meter:
        run_loss(srpo_loss, inputs, leaves, **options)
    return meter.multiply_adds / inputs["weight"].numel()


@pytest.mark.parametrize("mode", DISTILLATION_MODES)
@pytest.mark.parametrize("workspace_rows", [None, 7, 30])
def test_products_are_3_per_active_policy_row_and_4_per_distillation_row(
    plans: list[Plan], workspace_rows: int | None, mode: str
) -> None:
    inputs = loss_inputs(0, (8, 7))
    workspace_bytes = None if workspace_rows is None else workspace_rows * row_stride(33) * 8
    policy = policy_rows(inputs)
    inactive = int((policy & (inputs["advantages"] == 0)[:, None]).sum())
    active, distilled = int(policy.sum()) - inactive, int((inputs["mask"] & ~policy).sum())
    assert min(active, inactive, distilled, int((~inputs["mask"]).sum())) > 0

    def measured(leaves: tuple[str, ...] = LEAVES, **options: Any) -> float:
        config = SRPOConfig(distillation_mode=mode, **options)
        products = measured_products(inputs, leaves, config=config, workspace_bytes=workspace_bytes)
        assert products == plans[-1].student_products + plans[-1].teacher_products
        return products

    assert measured() == 3 * active + 4 * distilled
    assert measured(("hidden", "bias")) == 2 * active + 3 * distilled
    assert measured(("weight",)) == 2 * active + 3 * distilled
    assert measured(()) == active + 2 * distilled
    assert measured(count_inactive=True) == 3 * active + 4 * distilled + inactive
    assert measured(kl_coef=0.1) == 3 * (active + inactive) + 4 * distilled
    assert measured(dw_beta=30.0) == 3 * active + 5 * distilled


def test_a_long_gspo_sequence_costs_one_more_product_of_all_but_its_last_chunk(
    plans: list[Plan],
) -> None:
    inputs = loss_inputs(0, (2, 9)) | {"sdpo_mask": None, "teacher_hidden": None, "mask": None}
    inputs["advantages"] = torch.tensor([1.0, -1.0], dtype=torch.float64)
    config = SRPOConfig(loss_type="gspo")
    assert measured_products(inputs, config=config) == 3 * 18
    floor = workspace_floor(33, 8, 1)
    # Each sequence is three chunks of three rows.
    assert measured_products(inputs, config=config, workspace_bytes=3 * floor) == 3 * 18 + 2 * 6
    assert plans[-1].student_products == 3 * 18 + 2 * 6


def test_the_backward_of_token_stats_costs_nothing_where_nothing_comes_back() -> None:
    inputs = with_leaves(head_inputs(0, (10,), 8, 33) | {"mask": None, "teacher_hidden": None})
    with ProductMeter() as forward:
        loss = token_stats(**inputs).log_probs[:4].sum()
    with ProductMeter() as backward:
        loss.backward()
    assert forward.multiply_adds == 10 * 8 * 33
    assert backward.multiply_adds == 3 * 4 * 8 * 33


@pytest.mark.parametrize("mode", DISTILLATION_MODES)
def test_memory_is_the_workspace_and_dw_however_many_rows(mode: str) -> None:
    hidden_size, vocab_size, budget = 16, 4001, 160 * 4001 * 4
    config = SRPOConfig(distillation_mode=mode, entropy_coef=0.1)

    def extra_bytes(rows: int) -> int:
        inputs = loss_inputs(0, (rows,), hidden_size, vocab_size, config=config) | {"sequence_ids": None}
        inputs = with_leaves(cast(inputs, torch.float32))
        workspace.release()
        with MemoryMeter(*inputs.values()) as meter:
            srpo_loss(**inputs, config=config, workspace_bytes=budget).loss.backward()
        assert meter.largest <= budget
        return meter.peak - inputs["weight"].nbytes - inputs["hidden"].nbytes

    extra = extra_bytes(256)
    assert extra <= 1.05 * budget
    # A few numbers for each row, not a few for each logit.
    assert extra_bytes(1024) - extra <= 768 * 50 * 8


def test_what_a_log_shows_of_inactive_sequences_does_not_depend_on_chunks() -> None:
    inputs = loss_inputs(0, (6, 9)) | {"sdpo_mask": None, "teacher_hidden": None}
    inputs["advantages"][:4] = 0.0
    config = SRPOConfig(loss_type="gspo", count_inactive=True, epsilon_low=0.01, epsilon_high=0.01)
    expected = run_loss(srpo_loss, inputs, config=config)
    assert expected["metric scored_policy_tokens"] > expected["metric active_rows"] > 0
    actual = run_loss(srpo_loss, inputs, config=config, workspace_bytes=4 * workspace_floor(33, 8, 1))
    assert_same(actual, expected, 1e-11)
