"""How results are gathered by name, and compared with the oracle's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from srpo_kernels import SRPOConfig
from tests.inputs import LEAVES, Inputs

Results = dict[str, Tensor]


def run_loss(function: Callable[..., Any], inputs: Inputs, leaves: tuple[str, ...] = LEAVES, **options: Any) -> Results:
    """Loss, log-probs, metrics and gradients of one call, by name."""
    inputs = with_leaves(inputs, leaves)
    out = function(**inputs, **options)
    results = {"loss": out.loss.detach(), "log_probs": out.log_probs}
    results |= {f"metric {name}": value for name, value in out.metrics.items()}
    return results | gradients(out.loss, inputs)


def run_stats(
    function: Callable[..., Any],
    inputs: Inputs,
    coefficients: Tensor,
    leaves: tuple[str, ...] = LEAVES,
    **options: Any,
) -> Results:
    """Statistics of a call of ``token_stats``, and the gradients of their sum weighted by ``coefficients``."""
    inputs = with_leaves(inputs, leaves)
    out = function(**inputs, **options)
    results = {name: value for name, value in out._asdict().items() if value is not None}
    differentiable = [value for name, value in results.items() if name != "teacher_entropy"]
    total = sum((value * c.to(value)).sum() for value, c in zip(differentiable, coefficients, strict=False))
    assert isinstance(total, Tensor)
    return {name: value.detach() for name, value in results.items()} | gradients(total, inputs)


def with_leaves(inputs: Inputs, leaves: tuple[str, ...] = LEAVES) -> Inputs:
    """The inputs with fresh tensors for the leaves that are there, which require gradient."""
    present = [name for name in leaves if inputs.get(name) is not None]
    return inputs | {name: inputs[name].detach().clone().requires_grad_() for name in present}


def gradients(loss: Tensor, inputs: Inputs) -> Results:
    """The gradients of the inputs that require one, by name."""
    leaves = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}
    grads = torch.autograd.grad(loss, list(leaves.values())) if leaves else ()
    return {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_same(actual: Results, expected: Results, tolerance: float) -> None:
    """Every entry within ``tolerance``, relative to the largest element of the entry."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = largest(value)
        error = largest(actual[name].to(value) - value)
        assert error <= tolerance * scale + 1e-12, f"{name}: off by {error:.3g} at a scale of {scale:.3g}"


def assert_as_accurate(
    actual: Results,
    naive: Results,
    exact: Results,
    *,
    share: float = 1.0,
    condition: float = 1.0,
    rounding: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Every entry at most twice as far from the exact one as plain torch is, plus a few roundings in fp32.

    Whatever is made of logits and log-probs is rounded at their size even where it comes out near 0, and a gradient
    at a row's ``share`` of that. ``condition`` is how much a logit's rounding can grow on its way to the loss.
    ``rounding`` is what operands that are rounded to bf16 add to some.
    """
    assert actual.keys() == exact.keys()
    unit = 8.0 + largest(exact["log_probs"])
    for name, value in exact.items():
        assert actual[name].dtype == naive[name].dtype, name
        error = largest(actual[name].double() - value)
        scale = largest(value) + unit * (share if name.startswith("grad") else 1.0)
        allowed = 2 * largest(naive[name].double() - value) + 2**-20 * condition * scale
        allowed += rounding.get(name, 0.0)
        assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g}"


def assert_invariant(actual: Results, expected: Results, config: SRPOConfig) -> None:
    """Two ways to compute the same loss differ by next to nothing in fp64, and by a few roundings in fp32."""
    if expected["loss"].dtype == torch.float64:
        return assert_same(actual, expected, 1e-10)
    share = 1.0 / expected["log_probs"].numel()
    return assert_as_accurate(actual, expected, expected, share=share, condition=condition_of(config, expected))


def condition_of(config: SRPOConfig, exact: Results) -> float:
    """How much a logit's rounding can grow on its way to the loss."""
    # Weights are exponentials of dw_beta times an entropy, a sum over the vocabulary.
    condition = 1.0 + 4.0 * config.dw_beta
    if config.distillation_mode == "sampled":
        # Its loss is the product of two log-probs.
        condition *= 1.0 + largest(exact["log_probs"])
    return condition


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
