from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import srpo_kernels as sk
from srpo_kernels.losses.options import LOSS_TYPES

CONFIGS = {
    **{name: sk.SRPOConfig(loss_type=name, epsilon_low=0.05, epsilon_high=0.1) for name in LOSS_TYPES},
    "dual clip and delta": sk.SRPOConfig(dual_clip=1.2, delta=1.1),
    "kl and entropy": sk.SRPOConfig(kl_coef=0.3, kl_type="k2", entropy_coef=0.1),
}


def batch() -> dict[str, Tensor]:
    shape = (5, 7)
    return {
        "hidden": torch.randn(*shape, 8, dtype=torch.float64, requires_grad=True),
        "weight": torch.randn(19, 8, dtype=torch.float64),
        "target_ids": torch.randint(19, shape),
        "advantages": torch.randn(5, dtype=torch.float64),
        "mask": torch.rand(shape) < 0.7,
        "old_log_probs": -3.0 + torch.randn(shape, dtype=torch.float64),
        "ref_log_probs": -3.0 + torch.randn(shape, dtype=torch.float64),
        "is_weights": torch.rand(shape, dtype=torch.float64),
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_policy_loss_is_that_of_srpo_loss(name: str, packed: bool) -> None:
    config, given = CONFIGS[name], batch()
    expected = sk.srpo_loss(**given, config=config)
    (gradient,) = torch.autograd.grad(expected.loss, given["hidden"])

    stats = sk.token_stats(*(given[key] for key in ("hidden", "weight", "target_ids")), mask=given["mask"])
    inputs = {key: given[key] for key in ("advantages", "mask", "old_log_probs", "ref_log_probs", "is_weights")}
    values: dict[str, Any] = {"log_probs": stats.log_probs, **inputs}
    if config.entropy_coef != 0.0:
        values["entropy"] = stats.entropy
    if packed:
        # In an order in which sequences are mixed.
        order = torch.randperm(35)
        values["advantages"] = given["advantages"][:, None].expand(5, 7)
        values = {key: value.flatten()[order] for key, value in values.items()}
        values["sequence_ids"] = torch.arange(5).repeat_interleave(7)[order] * 3
    terms = sk.policy_loss(**values, config=config)
    loss = terms.loss.sum() / given["mask"].sum()
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(torch.autograd.grad(loss, given["hidden"])[0], gradient)
    counts = {"clip_low": "clip_low_count", "clip_high": "clip_high_count", "dual_clip": "dual_clip_count"}
    sums = {"approx_kl": "approx_kl_sum", "ref_kl": "ref_kl_sum"}
    for field, metric in (counts | sums).items():
        assert getattr(terms, field).sum().item() == pytest.approx(expected.metrics[metric].item()), field


@pytest.mark.parametrize("clip", [2.0, 1.01, None])
def test_the_sampled_distillation_is_that_of_srpo_loss(clip: float | None) -> None:
    config, given = sk.SRPOConfig(distillation_mode="sampled", distillation_is_clip=clip, dw_beta=0.0), batch()
    del given["ref_log_probs"], given["advantages"]
    teacher = torch.randn(5, 7, 8, dtype=torch.float64)
    everything = torch.ones(5, dtype=torch.bool)
    expected = sk.srpo_loss(**given, teacher_hidden=teacher, sdpo_mask=everything, config=config).loss
    (gradient,) = torch.autograd.grad(expected, given["hidden"])

    mask = given["mask"]
    log_probs = sk.token_stats(*(given[key] for key in ("hidden", "weight", "target_ids")), mask=mask).log_probs
    teacher_log_probs = sk.token_stats(teacher, given["weight"], given["target_ids"], mask=mask).log_probs
    inputs = {key: given[key] for key in ("mask", "old_log_probs", "is_weights")}
    losses = sk.sampled_distillation_loss(log_probs, teacher_log_probs, **inputs, config=config)
    loss = losses.sum() / mask.sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, given["hidden"])[0], gradient)


def test_masked_rows_are_never_read() -> None:
    log_probs = torch.tensor([-1.0, float("nan"), -2.0], requires_grad=True)
    mask = torch.tensor([True, False, True])
    terms = sk.policy_loss(log_probs, torch.tensor([1.0, float("inf"), 1.0]), mask=mask)
    terms.loss.sum().backward()
    assert terms.loss.tolist() == [-1.0, 0.0, -1.0]
    assert log_probs.grad is not None and log_probs.grad.tolist() == [-1.0, 0.0, -1.0]
    losses = sk.sampled_distillation_loss(log_probs, torch.tensor([-2.0, float("nan"), -2.0]), mask=mask)
    assert losses.tolist() == [-1.0, 0.0, -0.0]


def test_low_precision_is_widened() -> None:
    log_probs = torch.tensor([-1.0, -2.0], dtype=torch.bfloat16, requires_grad=True)
    terms = sk.policy_loss(log_probs, torch.ones(2))
    assert terms.loss.dtype == torch.float32
    terms.loss.sum().backward()
    assert log_probs.grad is not None and log_probs.grad.dtype == torch.bfloat16


ONES = torch.ones(2, 3)
BAD_POLICY: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "log_probs must have shape": (ValueError, {"log_probs": torch.ones(1, 2, 3)}),
    "log_probs must be a torch.Tensor": (TypeError, {"log_probs": None}),
    "advantages must have shape": (ValueError, {"advantages": torch.ones(3)}),
    "mask must be bool": (TypeError, {"mask": ONES}),
    "old_log_probs must have shape": (ValueError, {"old_log_probs": torch.ones(2)}),
    "is_weights must be": (TypeError, {"is_weights": ONES.long()}),
    "ref_log_probs is required": (ValueError, {"config": sk.SRPOConfig(kl_coef=0.1)}),
    "entropy is for an entropy_coef other than 0, got None": (ValueError, {"config": sk.SRPOConfig(entropy_coef=0.1)}),
    "entropy is for an entropy_coef other than 0, got a tensor": (ValueError, {"entropy": ONES}),
    "sequence_ids is for packed rows": (ValueError, {"sequence_ids": ONES.long()}),
    "sequence_ids is required": (
        ValueError,
        {"log_probs": ONES[0], "advantages": ONES[0], "config": sk.SRPOConfig(loss_type="gspo")},
    ),
    "config must be an SRPOConfig": (TypeError, {"config": {}}),
}


@pytest.mark.parametrize("message", BAD_POLICY)
def test_bad_calls_name_the_argument(message: str) -> None:
    error, arguments = BAD_POLICY[message]
    with pytest.raises(error, match=message):
        sk.policy_loss(**({"log_probs": ONES, "advantages": ONES} | arguments))


def test_bad_calls_of_the_distillation_name_the_argument() -> None:
    with pytest.raises(TypeError, match=r"teacher_log_probs must be a torch\.Tensor"):
        sk.sampled_distillation_loss(ONES, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="teacher_log_probs must have shape"):
        sk.sampled_distillation_loss(ONES, ONES[0])
