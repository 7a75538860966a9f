from __future__ import annotations

import math
import re

import pytest
import torch

from srpo_kernels.api.metrics import summarize_metrics
from srpo_kernels.losses.srpo import METRICS


def test_summaries_are_means() -> None:
    totals = {
        "policy_loss_sum": -6.0,
        "policy_tokens": 12.0,
        "sdpo_loss_sum": 2.0,
        "sdpo_tokens": 4.0,
        "active_rows": 10.0,
        "scored_policy_tokens": 8.0,
        "clip_low_count": 1.0,
        "clip_high_count": 2.0,
        "dual_clip_count": 4.0,
        "ref_kl_sum": 0.8,
        "approx_kl_sum": 1.6,
        "entropy_sum": 9.0,
        "entropy_tokens": 6.0,
        "teacher_entropy_sum": 10.0,
        "dw_weight_sum": 4.0,
        "dw_weight_sq_sum": 5.0,
        "divergence_sum": 1.0,
        "rollout_tokens": 8.0,
        "rollout_weight_sum": 6.0,
        "rollout_clipped_count": 1.0,
        "rollout_dropped_count": 2.0,
        "nonfinite_rows": 3.0,
    }
    assert tuple(totals) == METRICS
    metrics = {name: torch.tensor(total, dtype=torch.float64) for name, total in totals.items()}
    assert summarize_metrics(metrics) == pytest.approx(
        {
            "srpo/policy_loss": -0.5,
            "srpo/sdpo_loss": 0.5,
            "srpo/sdpo_token_fraction": 0.25,
            "srpo/active_fraction": 0.625,
            "srpo/clip_low_fraction": 0.125,
            "srpo/clip_high_fraction": 0.25,
            "srpo/dual_clip_fraction": 0.5,
            "srpo/ref_kl": 0.1,
            "srpo/approx_kl": 0.2,
            "srpo/entropy": 1.5,
            "srpo/teacher_entropy": 2.5,
            "srpo/divergence": 0.25,
            "srpo/dw_weight_mean": 1.0,
            "srpo/dw_weight_std": 0.5,
            "srpo/rollout_weight": 0.75,
            "srpo/rollout_clipped_fraction": 0.125,
            "srpo/rollout_dropped_fraction": 0.25,
            "srpo/nonfinite_rows": 3.0,
        }
    )


def test_a_mean_over_nothing_is_zero() -> None:
    assert set(summarize_metrics(dict.fromkeys(METRICS, torch.zeros(())))) == set(
        summarize_metrics(dict.fromkeys(METRICS, torch.ones(())))
    )
    assert set(summarize_metrics(dict.fromkeys(METRICS, torch.zeros(()))).values()) == {0.0}


def test_equal_weights_have_no_spread() -> None:
    metrics = dict.fromkeys(METRICS, torch.tensor(0.0))
    # In fp32, 3 * 0.1**2 / 3 - 0.1**2 is below zero.
    metrics |= {"sdpo_tokens": torch.tensor(3.0), "dw_weight_sum": torch.tensor(0.3)}
    metrics |= {"dw_weight_sq_sum": torch.tensor(0.03) - 1e-8}
    assert summarize_metrics(metrics)["srpo/dw_weight_std"] == 0.0


def test_nan_is_shown() -> None:
    metrics = dict.fromkeys(METRICS, torch.tensor(1.0))
    metrics |= {"dw_weight_sum": torch.tensor(math.nan), "policy_loss_sum": torch.tensor(math.nan)}
    summary = summarize_metrics(metrics)
    assert all(math.isnan(summary[f"srpo/{name}"]) for name in ("dw_weight_std", "policy_loss"))


def test_missing_keys_are_named() -> None:
    metrics = dict.fromkeys(METRICS[2:], torch.tensor(1.0))
    with pytest.raises(ValueError, match=re.escape("['policy_loss_sum', 'policy_tokens'] not found")):
        summarize_metrics(metrics)
