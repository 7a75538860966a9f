"""Rollout corrections: weights and masks from the log-probs of the engine that sampled."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
import srpo_kernels as sk
from tests.comparison import assert_same, run_loss
from tests.inputs import Inputs, cast, for_backend, loss_inputs
from tests.strategies import CORRECTIONS, each_backend

RC = sk.RolloutCorrection


def batch(config: sk.SRPOConfig, rows: tuple[int, ...]) -> Inputs:
    inputs = loss_inputs(2, rows, teacher_size=5, config=config)
    inputs["old_log_probs"] = inputs["ref_log_probs"]
    if len(rows) == 2:
        # Sequences of both branches: their rows meet in the correction.
        inputs["sdpo_mask"] = torch.rand(rows, generator=torch.Generator().manual_seed(0)) < 0.4
    return inputs


@each_backend
@pytest.mark.parametrize("rows", [(5, 6), (23,)], ids=["padded", "packed"])
@pytest.mark.parametrize("correction", CORRECTIONS, ids=range(len(CORRECTIONS)))
def test_parity(correction: RC, rows: tuple[int, ...], backend: str) -> None:
    for loss_type in ("grpo", "gspo"):
        config = sk.SRPOConfig(rollout_correction=correction, loss_type=loss_type, count_inactive=True)
        inputs = for_backend(batch(config, rows), backend)
        expected = run_loss(reference.srpo_loss, cast(inputs, torch.float64), config=config)
        actual = run_loss(sk.srpo_loss, inputs, config=config, backend=backend)
        assert_same(actual, expected, 1e-9 if backend == "torch" else 1e-4)
        assert actual["metric rollout_weight_sum"] > 0 and actual["metric rollout_tokens"] > 0


@pytest.mark.parametrize("correction", [x for x in CORRECTIONS if not x.by_sequence], ids=str)
def test_without_old_log_probs_the_current_ones_are_corrected(correction: RC) -> None:
    config = sk.SRPOConfig(rollout_correction=correction)
    inputs = batch(config, (5, 6)) | {"old_log_probs": None}
    assert_same(
        run_loss(sk.srpo_loss, inputs, config=config), run_loss(reference.srpo_loss, inputs, config=config), 1e-9
    )


def weights_of(correction: RC, log_ratio: list[float]) -> list[float]:
    """The weights of two sequences, of all but the last row and of that."""
    rollout = torch.full((len(log_ratio),), -1.0, dtype=torch.float64)
    terms = sk.policy_loss(
        rollout,
        torch.ones_like(rollout),
        old_log_probs=rollout + torch.tensor(log_ratio, dtype=torch.float64),
        rollout_log_probs=rollout,
        sequence_ids=torch.tensor([0] * (len(log_ratio) - 1) + [1]),
        config=sk.SRPOConfig(loss_type="reinforce", rollout_correction=correction),
    )
    return [float(x) for x in terms.loss]


LOG_2 = math.log(2.0)
BY_HAND: list[tuple[RC, list[float], list[float]]] = [
    (RC.tis(3.0), [LOG_2, 2 * LOG_2, -LOG_2, 0.0], [2.0, 3.0, 0.5, 1.0]),
    (RC.tis(3.0, level="sequence"), [LOG_2, LOG_2, -2 * LOG_2, LOG_2], [1.0, 1.0, 1.0, 2.0]),
    (RC.mis(3.0), [LOG_2, 2 * LOG_2, -LOG_2, 0.0], [2.0, 0.0, 0.5, 1.0]),
    (RC.icepop(0.75, 3.0), [LOG_2, 2 * LOG_2, -LOG_2, 0.0], [2.0, 0.0, 0.0, 1.0]),
    (RC(level="geometric", weight_min=0.7), [LOG_2, LOG_2, LOG_2, -LOG_2], [2.0, 2.0, 2.0, 0.7]),
    (RC(level=None, masks={"token_k1": (-0.1, 1.0)}), [LOG_2, 2 * LOG_2, -LOG_2, 0.0], [1.0, 0.0, 0.0, 1.0]),
    (RC(level=None, masks={"seq_mean_k1": 0.5}), [LOG_2, LOG_2, 0.0, LOG_2], [1.0, 1.0, 1.0, 0.0]),
    (RC(level=None, masks={"seq_sum_k1": 0.5}), [LOG_2, LOG_2, 0.0, 0.4], [0.0, 0.0, 0.0, 1.0]),
    (RC(level=None, masks={"seq_max_k2": 0.5}), [1.1, 0.0, 0.0, -0.9], [0.0, 0.0, 0.0, 1.0]),
    (RC(level=None, masks={"seq_max_k3": 1.0}), [-2.5, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]),
    (RC.tis(3.0), [math.nan, 5000.0, -5000.0, 0.0], [1.0, 3.0, math.exp(-20), 1.0]),
    (RC.tis(3.0, level="sequence"), [math.nan, LOG_2, 0.0, 0.0], [2.0, 2.0, 2.0, 1.0]),
]


@pytest.mark.parametrize(("correction", "log_ratio", "expected"), BY_HAND)
def test_weights_by_hand(correction: RC, log_ratio: list[float], expected: list[float]) -> None:
    assert weights_of(correction, log_ratio) == pytest.approx(expected, abs=1e-12)


def test_off_policy_sequences_with_a_negative_advantage_are_left_out() -> None:
    current, rollout = torch.tensor([[-2.0, -1.5], [-2.0, -1.5]]), torch.tensor([[-1.0, -1.0], [-1.0, -1.0]])
    config = sk.SRPOConfig(loss_type="reinforce", rollout_correction=RC(level=None, off_policy_threshold=0.7))
    terms = sk.policy_loss(current, torch.tensor([1.0, -1.0]), rollout_log_probs=rollout, config=config)
    torch.testing.assert_close(terms.loss, torch.tensor([[2.0, 1.5], [0.0, 0.0]]))
    kept = sk.SRPOConfig(loss_type="reinforce", rollout_correction=RC(level=None, off_policy_threshold=0.8))
    assert (sk.policy_loss(current, torch.tensor([1.0, -1.0]), rollout_log_probs=rollout, config=kept).loss != 0).all()


def test_sampled_distillation_is_corrected_too() -> None:
    log_probs, teacher = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-2.0, -2.5, -1.0])
    config = sk.SRPOConfig(rollout_correction=RC.tis(1.5))
    rollout = log_probs - torch.tensor([0.1, 3.0, -1.0])
    plain = sk.sampled_distillation_loss(log_probs, teacher)
    corrected = sk.sampled_distillation_loss(log_probs, teacher, rollout_log_probs=rollout, config=config)
    weights = torch.tensor([math.exp(0.1), 1.5, math.exp(-1.0)])
    torch.testing.assert_close(corrected, plain * weights)


def test_masked_rows_are_never_read() -> None:
    config = sk.SRPOConfig(rollout_correction=RC(level="sequence", masks={"seq_max_k3": 1.0}, off_policy_threshold=0.1))
    inputs = batch(config, (5, 6))
    masked = ~inputs["mask"]
    clean = run_loss(sk.srpo_loss, inputs, config=config)
    spoilt: dict[str, Tensor] = {}
    for name in ("rollout_log_probs", "old_log_probs"):
        spoilt[name] = inputs[name].masked_fill(masked, math.inf)
    assert_same(run_loss(sk.srpo_loss, inputs | spoilt, config=config), clean, 0.0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"level": "row"}, ValueError, r"level must be one of \('token', 'sequence', 'geometric'\), got 'row'"),
        ({"level": 1}, TypeError, "level must be one of"),
        ({"outside": "drop"}, ValueError, r"outside must be one of \('clamp', 'zero'\), got 'drop'"),
        ({"weight_max": 0.0}, ValueError, "weight_max must be .* > 0, or None, got 0.0"),
        ({"weight_min": "1"}, TypeError, "weight_min must be a number"),
        ({"weight_min": 3.0}, ValueError, "weight_min and weight_max must be the least and the largest value, got 3.0"),
        ({"off_policy_threshold": -0.1}, ValueError, "off_policy_threshold must be .* >= 0, or None, got -0.1"),
        ({"masks": {"seq_k1": 1.0}}, ValueError, "masks must be one of .*'seq_max_k3'.*, got 'seq_k1'"),
        ({"masks": {"token_k1": None}}, ValueError, r"masks\['token_k1'\] must have a bound, got None"),
        ({"masks": {"token_k1": (1.0, 0.0)}}, ValueError, r"masks\['token_k1'\] must be the least and the largest"),
        ({"masks": {"token_k1": "x"}}, TypeError, r"masks\['token_k1'\] must be a number"),
        ({"masks": {3: 1.0}}, TypeError, "masks must be one of"),
        ({"masks": 3}, TypeError, "masks must be a mapping"),
    ],
)
def test_a_bad_correction_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RC(**options)


def test_what_a_call_lacks_or_does_not_read_is_refused() -> None:
    config = sk.SRPOConfig(rollout_correction=RC.mis(level="sequence"))
    inputs = batch(config, (23,))
    for change, message in (
        ({"rollout_log_probs": None}, "rollout_log_probs is for config.rollout_correction, and needed by it: got None"),
        ({"old_log_probs": None}, "old_log_probs is required with RolloutCorrection.*whole sequences"),
        ({"sequence_ids": None}, "sequence_ids is required for packed rows .*RolloutCorrection"),
        ({"config": sk.SRPOConfig()}, "rollout_log_probs is for config.rollout_correction.*got a tensor with None"),
    ):
        with pytest.raises(ValueError, match=message):
            sk.srpo_loss(**{**inputs, "config": config, **change})


def test_equal_corrections_are_one_config() -> None:
    first = RC(masks={"token_k2": 1, "seq_max_k3": (None, 2.0)})
    second = RC(masks={"seq_max_k3": 2.0, "token_k2": (None, 1)})
    assert first == second and hash(first) == hash(second)
    config = sk.SRPOConfig(rollout_correction=first)
    assert sk.SRPOConfig.decode(config.encode()) == config


def test_weights_of_a_column_are_those_of_every_token() -> None:
    config = sk.SRPOConfig()
    inputs = loss_inputs(1, (4, 6))
    weights = torch.rand(4, dtype=torch.float64)
    forms = (weights, weights[:, None], weights[:, None].expand(4, 6))
    advantages = inputs["advantages"]
    results = [
        run_loss(sk.srpo_loss, inputs | {"is_weights": x, "advantages": a}, config=config)
        for x, a in zip(forms, (advantages[:, None], advantages, advantages), strict=True)
    ]
    for other in results[1:]:
        assert_same(other, results[0], 0.0)
