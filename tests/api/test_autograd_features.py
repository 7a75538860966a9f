"""What PyTorch can put around a loss: each works, or is refused. ``torch.compile`` is in ``test_compile``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import reference
from srpo_kernels import SRPOConfig, srpo_loss, token_stats
from tests.comparison import Results, assert_same, gradients, largest, with_leaves
from tests.inputs import LEAVES, Inputs, cast, head_inputs, loss_inputs

Call = Callable[..., Tensor]


def loss_of(**inputs: Any) -> Tensor:
    return srpo_loss(**inputs).loss


def statistics_of(**inputs: Any) -> Tensor:
    out = token_stats(**inputs)
    return (out.log_probs + 0.5 * out.entropy - 2.0 * out.divergence).mean()


CALLS: dict[str, tuple[Call, Inputs]] = {
    "srpo_loss": (loss_of, loss_inputs(0, (4, 6))),
    "token_stats": (statistics_of, head_inputs(0, (4, 6), 8, 33)),
}
each_call = pytest.mark.parametrize(("function", "inputs"), CALLS.values(), ids=CALLS)


def expected_gradients(function: Call, inputs: Inputs) -> Results:
    inputs = with_leaves(inputs)
    return gradients(function(**inputs), inputs)


def scaled(results: Results, factor: float) -> Results:
    return {name: x * factor for name, x in results.items()}


def accumulated(inputs: Inputs) -> Results:
    return {f"grad {name}": inputs[name].grad for name in LEAVES}


# Several backwards, hooks on what is saved, recomputation.


@each_call
def test_one_output_in_several_sums_and_backwards(function: Call, inputs: Inputs) -> None:
    expected, inputs = expected_gradients(function, inputs), with_leaves(inputs)
    loss = function(**inputs)
    (loss + 3.0 * loss).backward(retain_graph=True)
    loss.backward(retain_graph=True)
    (-2.0 * loss).backward()
    assert_same(accumulated(inputs), scaled(expected, 3.0), 1e-12)


@each_call
def test_a_backward_for_some_of_the_inputs(function: Call, inputs: Inputs) -> None:
    expected, inputs = expected_gradients(function, inputs), with_leaves(inputs)
    loss = function(**inputs)
    for name in LEAVES:
        (grad,) = torch.autograd.grad(loss, inputs[name], retain_graph=True)
        assert_same({name: grad}, {name: expected[f"grad {name}"]}, 1e-12)


@pytest.mark.parametrize("hooks", [save_on_cpu, partial(saved_tensors_hooks, lambda x: x, lambda x: x)])
@each_call
def test_hooks_on_saved_tensors(function: Call, inputs: Inputs, hooks: Callable[[], Any]) -> None:
    expected, inputs = expected_gradients(function, inputs), with_leaves(inputs)
    with hooks():
        loss = function(**inputs)
    (2.0 * loss).backward(retain_graph=True)
    loss.backward()
    assert_same(accumulated(inputs), scaled(expected, 3.0), 1e-12)


@pytest.mark.parametrize("use_reentrant", [True, False])
@each_call
def test_gradient_checkpointing(function: Call, inputs: Inputs, use_reentrant: bool) -> None:
    expected, inputs = expected_gradients(function, inputs), with_leaves(inputs)

    def from_leaves(*leaves: Tensor) -> Tensor:
        return function(**inputs | dict(zip(LEAVES, leaves, strict=True)))

    loss = checkpoint(from_leaves, *(inputs[name] for name in LEAVES), use_reentrant=use_reentrant)
    loss.backward()
    assert_same(accumulated(inputs), expected, 0.0)


# Function transforms and second derivatives.


@each_call
def test_functional_gradients(function: Call, inputs: Inputs) -> None:
    expected = expected_gradients(function, inputs)

    def from_leaves(leaves: Inputs) -> Tensor:
        return function(**inputs | leaves)

    leaves = {name: inputs[name] for name in LEAVES}
    results = torch.func.grad(from_leaves)(leaves)
    assert_same({f"grad {name}": x for name, x in results.items()}, expected, 0.0)
    loss, backward = torch.func.vjp(from_leaves, leaves)
    (results,) = backward(torch.full_like(loss, -2.0))
    assert_same({f"grad {name}": x for name, x in results.items()}, scaled(expected, -2.0), 0.0)


@each_call
def test_what_has_no_rule_is_refused(function: Call, inputs: Inputs) -> None:
    def from_hidden(hidden: Tensor) -> Tensor:
        return function(**inputs | {"hidden": hidden})

    hidden = inputs["hidden"]
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(from_hidden)(hidden.expand(2, *hidden.shape))
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(from_hidden, (hidden,), (hidden,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        from_hidden(forward_ad.make_dual(hidden, hidden))


def penalty_of_the_gradient(function: Call, inputs: Inputs) -> Tensor:
    (grad,) = torch.autograd.grad(function(**inputs), inputs["hidden"], create_graph=True)
    # Another way to the leaf: without a refusal, this sum has a gradient, and a wrong one.
    return grad.sum() + inputs["hidden"].sum()


@each_call
def test_second_derivatives_are_refused(function: Call, inputs: Inputs) -> None:
    leaves = with_leaves(inputs)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        penalty_of_the_gradient(function, leaves).backward()

    def first(hidden: Tensor) -> Tensor:
        return torch.func.grad(lambda hidden: function(**inputs | {"hidden": hidden}))(hidden)

    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.func.grad(lambda hidden: first(hidden).sum())(inputs["hidden"])


@each_call
def test_the_upstream_gradient_gets_no_second_derivative_either(function: Call, inputs: Inputs) -> None:
    factor, leaves = torch.ones((), dtype=torch.float64, requires_grad=True), with_leaves(inputs)
    (grad,) = torch.autograd.grad(factor * function(**leaves), leaves["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(grad.sum(), factor)


@each_call
def test_a_graph_of_the_gradient_alone_changes_nothing(function: Call, inputs: Inputs) -> None:
    expected, inputs = expected_gradients(function, inputs), with_leaves(inputs)
    leaves = [inputs[name] for name in LEAVES]
    grads = torch.autograd.grad(function(**inputs), leaves, create_graph=True)
    assert_same({f"grad {n}": x.detach() for n, x in zip(LEAVES, grads, strict=True)}, expected, 0.0)


# Mixed precision.


@each_call
def test_autocast_changes_nothing(function: Call, inputs: Inputs) -> None:
    inputs = cast(inputs, torch.float32)
    expected = expected_gradients(function, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(expected_gradients(function, inputs), expected, 0.0)


def test_autocast_before_the_loss() -> None:
    """Hidden states of autocast are bf16 beside a weight in fp32: the loss is that of these states."""
    inputs = cast(loss_inputs(0, (4, 6)), torch.float32)
    torch.manual_seed(0)
    body = nn.Linear(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = body(inputs["hidden"])
        leaves = with_leaves(inputs | {"hidden": hidden})
        loss = srpo_loss(**leaves).loss
        srpo_loss(**inputs | {"hidden": hidden}).loss.backward()
    assert hidden.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    exact = reference.srpo_loss(**cast(inputs | {"hidden": hidden.detach()}, torch.float64), config=SRPOConfig())
    torch.testing.assert_close(loss.double(), exact.loss, rtol=1e-6, atol=0)
    assert gradients(loss, leaves)["grad hidden"].dtype == torch.bfloat16
    assert body.weight.grad.isfinite().all()


@each_call
def test_a_scaler_multiplies_before_gradients_are_rounded_to_fp16(function: Call, inputs: Inputs) -> None:
    """Small gradients survive in fp16 because the scale comes before the rounding."""
    exact = expected_gradients(function, inputs)
    half, small, scale = with_leaves(cast(inputs, torch.float16)), 2.0**-20, 2.0**20
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(small * function(**half)).backward()
    for name in LEAVES:
        error = largest(half[name].grad.double() - exact[f"grad {name}"])
        assert error < 0.02 * largest(exact[f"grad {name}"])
    # What the scale is for.
    assert largest(half["hidden"].grad) * small < torch.finfo(torch.float16).tiny


@each_call
def test_a_scale_that_is_too_large_overflows_and_the_step_is_skipped(function: Call, inputs: Inputs) -> None:
    master = inputs["weight"].float().requires_grad_()
    optimizer = torch.optim.SGD([master], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    before = master.detach().clone()
    scaler.scale(function(**cast(inputs, torch.float16) | {"weight": master.half()})).backward()
    assert master.grad.isinf().any()
    assert not master.grad.isnan().any()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(master, before)
    assert scaler.get_scale() == 2.0**29


# Heads that are shared or frozen.


@each_call
def test_a_head_tied_to_the_embedding_gets_both_gradients(function: Call, inputs: Inputs) -> None:
    inputs = inputs | {"bias": None, "teacher_hidden": inputs["hidden"].flip(0)}
    weight = inputs["weight"].clone().requires_grad_()
    words = torch.arange(24).view(4, 6)

    def total(embedding: Tensor, head: Tensor) -> Tensor:
        return function(**inputs | {"hidden": embedding[words].tanh(), "weight": head})

    apart = [weight.detach().clone().requires_grad_() for _ in range(2)]
    total(weight, weight).backward()
    total(*apart).backward()
    assert_same({"weight": weight.grad}, {"weight": apart[0].grad + apart[1].grad}, 1e-12)
    assert largest(apart[0].grad) > 0
    assert largest(apart[1].grad) > 0


@each_call
def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_the_same(function: Call, inputs: Inputs) -> None:
    expected = expected_gradients(function, inputs)["grad hidden"]
    frozen = with_leaves(inputs, ("hidden",))
    function(**frozen).backward()
    assert_same({"hidden": frozen["hidden"].grad}, {"hidden": expected}, 0.0)
    assert frozen["weight"].grad is None
