"""The same values in another form: strides, integer widths, expanded views, autocast, mixed dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from srpo_kernels import Normalizers, SRPOConfig, srpo_loss, teacher_stats, token_stats
from srpo_kernels.losses.options import LOSS_TYPES, REDUCTIONS
from srpo_kernels.rows.spec import DIVERGENCES
from tests.comparison import assert_same, gradients, run_loss, with_leaves
from tests.inputs import LEAVES, SHARED, Inputs, cast, head_inputs, loss_inputs, take


@pytest.fixture
def inputs() -> Inputs:
    return loss_inputs(0, (6, 7))


def test_autocast_changes_nothing(inputs: Inputs) -> None:
    inputs = cast(inputs, torch.float32)
    expected = run_loss(srpo_loss, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(run_loss(srpo_loss, inputs), expected, 0.0)
        call = with_leaves(head_inputs(0, (6, 7), 8, 33))
        inside = gradients(token_stats(**call).divergence.sum(), call)
        teacher = teacher_stats(inputs["teacher_hidden"], inputs["weight"])
    assert_same(inside, gradients(token_stats(**call).divergence.sum(), call), 0.0)
    outside = teacher_stats(inputs["teacher_hidden"], inputs["weight"])
    assert_same(teacher._asdict(), outside._asdict(), 0.0)


@pytest.mark.parametrize("name", [*LEAVES, "teacher_hidden", "target_ids", "mask", "old_log_probs"])
def test_strided_tensors(inputs: Inputs, name: str) -> None:
    value = inputs[name]
    strided = torch.stack([value, torch.zeros_like(value)], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    expected = run_loss(srpo_loss, inputs, leaves=())
    assert_same(run_loss(srpo_loss, inputs | {name: strided}, leaves=()), expected, 1e-13)


def test_gradients_of_strided_tensors(inputs: Inputs) -> None:
    expected = run_loss(srpo_loss, inputs)
    base = with_leaves(inputs | {"hidden": inputs["hidden"].transpose(0, 1), "weight": inputs["weight"].t()})
    call = base | {"hidden": base["hidden"].transpose(0, 1), "weight": base["weight"].t()}
    actual = gradients(srpo_loss(**call).loss, base)
    torch.testing.assert_close(actual["grad hidden"].transpose(0, 1), expected["grad hidden"])
    torch.testing.assert_close(actual["grad weight"].t(), expected["grad weight"])


def test_shifted_hidden_states_of_a_whole_sequence(inputs: Inputs) -> None:
    # What a trainer passes: the states before each response token, a slice of prompt and response.
    states = torch.randn(6, 12, 8, dtype=torch.float64, requires_grad=True)
    loss = srpo_loss(**inputs | {"hidden": states[:, 4:-1]}).loss
    (grad,) = torch.autograd.grad(loss, states)
    expected = run_loss(srpo_loss, inputs | {"hidden": states[:, 4:-1].detach()})["grad hidden"]
    torch.testing.assert_close(grad[:, 4:-1], expected)
    assert not grad[:, :4].any()
    assert not grad[:, -1].any()


def test_int32_target_ids(inputs: Inputs) -> None:
    narrow = inputs | {"target_ids": inputs["target_ids"].int()}
    assert_same(run_loss(srpo_loss, narrow), run_loss(srpo_loss, inputs), 0.0)


def test_expanded_advantages_and_routes(inputs: Inputs) -> None:
    expanded = {name: inputs[name][:, None].expand(6, 7) for name in ("advantages", "sdpo_mask")}
    assert_same(run_loss(srpo_loss, inputs | expanded), run_loss(srpo_loss, inputs), 0.0)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("function", [srpo_loss, reference.srpo_loss], ids=["library", "reference"])
def test_a_sequence_without_a_valid_token_changes_nothing(
    inputs: Inputs, function: Callable[..., Any], loss_type: str, reduction: str
) -> None:
    """Padded or packed, with its masked rows or without, counted here or by ``Normalizers``."""
    config = SRPOConfig(loss_type=loss_type, reduction=reduction, max_length=9 if reduction == "constant" else None)
    inputs["mask"][[1, 4]] = False
    mask = inputs["mask"]
    expected = run_loss(function, take(inputs, mask.any(1).nonzero().squeeze(1)), config=config)["loss"]
    torch.testing.assert_close(run_loss(function, inputs, config=config)["loss"], expected)

    per_sequence = {name: inputs[name][:, None].expand_as(mask) for name in ("advantages", "sdpo_mask")}
    rows = inputs | per_sequence | {"sequence_ids": torch.arange(6)[:, None].expand_as(mask)}
    for chosen in (torch.ones_like(mask), mask):
        packed = {name: x if name in SHARED else x[chosen] for name, x in rows.items()}
        torch.testing.assert_close(run_loss(function, packed, config=config)["loss"], expected)
        ids = packed["sequence_ids"]
        entropy = teacher_stats(packed["teacher_hidden"], inputs["weight"], teacher_bias=inputs["bias"]).entropy
        norms = Normalizers.from_batch(packed["mask"], packed["sdpo_mask"], entropy, sequence_ids=ids, config=config)
        for form in (packed, inputs):
            given = run_loss(function, form, config=config, normalizers=norms)["loss"]
            torch.testing.assert_close(given, expected)
        assert norms.sequence_count == Normalizers.from_batch(mask, None, None, 0.0).sequence_count == 4


def test_advantages_that_require_grad_get_none(inputs: Inputs) -> None:
    inputs["advantages"].requires_grad_()
    loss = srpo_loss(**with_leaves(inputs)).loss
    assert torch.autograd.grad(loss, inputs["advantages"], allow_unused=True) == (None,)


def test_a_tied_embedding_gets_both_gradients(inputs: Inputs) -> None:
    weight = inputs["weight"].clone().requires_grad_()

    def gradient(function: Callable[..., Any]) -> Tensor:
        hidden = torch.nn.functional.embedding(inputs["target_ids"], weight)
        loss = function(**inputs | {"hidden": hidden, "weight": weight}, config=SRPOConfig()).loss
        return torch.autograd.grad(loss, weight)[0]

    torch.testing.assert_close(gradient(srpo_loss), gradient(reference.srpo_loss))


@pytest.mark.parametrize("teacher", [torch.float32, torch.bfloat16], ids=str)
def test_a_teacher_of_another_dtype(teacher: torch.dtype) -> None:
    inputs = cast(loss_inputs(0, (6, 7), teacher_size=5), torch.bfloat16)
    names = ("teacher_hidden", "teacher_weight", "teacher_bias")
    mixed = inputs | {name: inputs[name].to(teacher) for name in names} | {"weight": inputs["weight"].float()}
    exact = run_loss(reference.srpo_loss, cast(inputs, torch.float64), config=SRPOConfig())
    actual = run_loss(srpo_loss, mixed)
    torch.testing.assert_close(actual["loss"].double(), exact["loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual["grad weight"].double(), exact["grad weight"], rtol=1e-5, atol=1e-6)


# In gspo_token, whose gradient is not that of its value, no factor can be held.
@pytest.mark.parametrize("loss_type", sorted(set(LOSS_TYPES) - {"gspo_token"}))
def test_gradcheck_of_the_policy_branch(loss_type: str) -> None:
    config = SRPOConfig(loss_type=loss_type, kl_coef=0.1, entropy_coef=0.1, softcap=3.0)
    check_gradients(loss_inputs(1, (3, 2), 3, 5, config=config) | {"sdpo_mask": None, "teacher_hidden": None}, config)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("mode", ["full", "topk"])
def test_gradcheck_of_the_distillation_branch(mode: str, divergence: str) -> None:
    config = SRPOConfig(distillation_mode=mode, topk=2, divergence=divergence, distillation_is_clip=None)
    routed = torch.ones(3, dtype=torch.bool)
    check_gradients(loss_inputs(1, (3, 2), 3, 5, teacher_size=2) | {"sdpo_mask": routed}, config)


def check_gradients(inputs: Inputs, config: SRPOConfig) -> None:
    """Finite differences, in the forms whose every detached factor is a constant."""
    inputs = with_leaves(inputs)

    def loss(*leaves: Tensor) -> Tensor:
        return srpo_loss(**inputs | dict(zip(LEAVES, leaves, strict=True)), config=config).loss

    if config.loss_type in ("cispo", "vespo", "dppo_tv", "dppo_kl"):
        # What they weight the gradient with is detached: held at its bound, it is constant.
        inputs["old_log_probs"] = inputs["old_log_probs"] - 10.0
    assert torch.autograd.gradcheck(loss, [inputs[name] for name in LEAVES])
