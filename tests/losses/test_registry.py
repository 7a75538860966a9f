"""A policy loss of a user's: registered once, there in every function, with options of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import srpo_kernels as sk
from srpo_kernels.losses.registry import POLICY_LOSSES
from tests.comparison import assert_same, run_loss
from tests.inputs import Inputs, loss_inputs


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """As it was before."""
    known = dict(POLICY_LOSSES)
    yield
    POLICY_LOSSES.clear()
    POLICY_LOSSES.update(known)


def tempered(rows: sk.PolicyRows, *, tau: float = 2.0) -> Tensor:
    return -rows.advantages * (rows.log_ratio / tau).exp()


def offset(rows: sk.PolicyRows, *, epsilon_high: float) -> Tensor:
    """Not 0 where the advantage is."""
    return -(rows.advantages + epsilon_high) * rows.log_probs


def clipped_mean(rows: sk.PolicyRows, *, epsilon_low: float, epsilon_high: float) -> sk.TokenLoss:
    ratio = rows.sequence_mean(rows.log_ratio).exp()
    high = ratio > 1 + epsilon_high
    loss = -ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * rows.advantages * rows.sequence_lengths()
    return sk.TokenLoss(loss, clip_high=high)


def batch() -> Inputs:
    return loss_inputs(1, (6, 5)) | {"sdpo_mask": None, "teacher_hidden": None}


def expected(inputs: Inputs, losses: Any) -> dict[str, Tensor]:
    """Loss and gradients of ``losses(log_probs, log_ratio, advantages)`` from token_stats, over all valid tokens."""
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")}
    stats = sk.token_stats(**leaves, target_ids=inputs["target_ids"], mask=inputs["mask"])
    ratio = (stats.log_probs - inputs["old_log_probs"]).clamp(-20, 20)
    advantages = inputs["advantages"][:, None].expand_as(ratio)
    values = losses(stats.log_probs, ratio, advantages) * inputs["is_weights"]
    loss = (values * inputs["mask"]).sum() / inputs["mask"].sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach()} | {f"grad {name}": g for name, g in zip(leaves, grads, strict=True)}


def of(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: results[name] for name in ("loss", "grad hidden", "grad weight", "grad bias")}


@pytest.mark.parametrize("tau", [2.0, 0.7])
def test_a_registered_loss_with_an_option(tau: float) -> None:
    sk.register_policy_loss("tempered", tempered, zero_without_advantage=True)
    inputs = batch()
    options: dict[str, Any] = {} if tau == 2.0 else {"loss_options": {"tau": tau}}
    config = sk.SRPOConfig(loss_type="tempered", **options)
    actual = run_loss(sk.srpo_loss, inputs, config=config)
    assert_same(of(actual), expected(inputs, lambda p, ratio, a: -a * (ratio / tau).exp()), 1e-11)
    terms = sk.policy_loss(torch.zeros(2), torch.ones(2), old_log_probs=torch.ones(2), config=config)
    torch.testing.assert_close(terms.loss, -torch.full((2,), -1.0 / tau).exp())


def test_rows_without_an_advantage_count_unless_the_loss_says_otherwise() -> None:
    sk.register_policy_loss("offset", offset)
    inputs = batch()
    inputs["advantages"][:3] = 0.0
    actual = run_loss(sk.srpo_loss, inputs, config=sk.SRPOConfig(loss_type="offset"))
    assert_same(of(actual), expected(inputs, lambda p, ratio, a: -(a + 0.28) * p), 1e-11)
    assert actual["metric active_rows"] == inputs["mask"].sum()


def test_a_loss_of_whole_sequences_with_clips() -> None:
    sk.register_policy_loss("mean", clipped_mean, whole_sequences=True)
    inputs, mask = batch(), batch()["mask"]

    def losses(log_probs: Tensor, ratio: Tensor, advantages: Tensor) -> Tensor:
        lengths = mask.sum(1, keepdim=True)
        mean = ((ratio * mask).sum(1, keepdim=True) / lengths).exp()
        return -mean.clamp(0.8, 1.28) * advantages * lengths

    floor = 3 * 48 * 8
    for workspace_bytes in (None, 7 * floor):
        config = sk.SRPOConfig(loss_type="mean")
        actual = run_loss(sk.srpo_loss, inputs, config=config, workspace_bytes=workspace_bytes)
        assert_same(of(actual), expected(inputs, losses), 1e-11)
        assert actual["metric clip_high_count"] > 0
        assert actual["metric clip_low_count"] == 0


def test_a_compiled_call() -> None:
    sk.register_policy_loss("tempered", tempered)
    inputs = {name: x for name, x in batch().items() if x is not None}
    config = sk.SRPOConfig(loss_type="tempered", loss_options={"tau": 3})

    def call(hidden: Tensor) -> Tensor:
        return sk.srpo_loss(**inputs | {"hidden": hidden}, config=config).loss

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs["hidden"]), call(inputs["hidden"]))


def test_a_loss_of_another_shape_is_refused() -> None:
    sk.register_policy_loss("summed", lambda rows: rows.log_probs.sum())
    with pytest.raises(ValueError, match=r"the policy loss 'summed' must return one loss per row, \[\d+\], got \[\]"):
        run_loss(sk.srpo_loss, batch(), config=sk.SRPOConfig(loss_type="summed"))


def test_sequences_need_to_be_asked_for() -> None:
    sk.register_policy_loss("mean", clipped_mean)
    with pytest.raises(ValueError, match="must be registered with whole_sequences=True"):
        run_loss(sk.srpo_loss, batch(), config=sk.SRPOConfig(loss_type="mean"))


BAD: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((3, tempered), {}, TypeError, "name must be a string"),
    (("", tempered), {}, ValueError, "name must be a new one"),
    (("grpo", tempered), {}, ValueError, "name must be a new one.*got 'grpo'"),
    (("x", 3), {}, TypeError, "function must be callable"),
    (("x", lambda rows, *, kl_coef: 0), {}, TypeError, "parameter 'kl_coef', which must be one of"),
    (("x", lambda rows, *, tau="a": 0), {}, TypeError, "default of 'tau'.*must be a number, got 'a'"),
    (("x", lambda rows, *, tau=True: 0), {}, TypeError, "default of 'tau'"),
    (("x", tempered), {"ranges": {"tao": ("> 0", lambda x: x > 0)}}, ValueError, r"ranges.*got \['tao'\]"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD, ids=range(len(BAD)))
def test_a_bad_registration_is_refused(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sk.register_policy_loss(*arguments, **options)
    assert "x" not in POLICY_LOSSES


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tau": 0}, ValueError, r"loss_options\['tau'\] must be a finite number > 0, got 0"),
        ({"tau": "1"}, TypeError, r"loss_options\['tau'\] must be a number"),
        ({"tau": float("nan")}, ValueError, r"loss_options\['tau'\]"),
        ({"beta": 1.0}, ValueError, r"loss_options must be among \('tau',\) with loss_type='tempered', got 'beta'"),
        ({3: 1.0}, TypeError, "loss_options must have strings as names"),
        (3, TypeError, "loss_options must be a mapping"),
    ],
    ids=str,
)
def test_a_bad_option_is_refused(options: Any, error: type[Exception], message: str) -> None:
    sk.register_policy_loss("tempered", tempered, ranges={"tau": ("> 0", lambda tau: tau > 0)})
    with pytest.raises(error, match=message):
        sk.SRPOConfig(loss_type="tempered", loss_options=options)


def test_configs_with_the_same_options_are_equal() -> None:
    first = sk.SRPOConfig(loss_type="sapo", loss_options={"tau_positive": 2.0, "tau_negative": 3.0})
    second = sk.SRPOConfig(loss_type="sapo", loss_options={"tau_negative": 3.0, "tau_positive": 2.0})
    assert first == second
    assert hash(first) == hash(second)
    assert sk.SRPOConfig.decode(first.encode()) == first
