"""QuACK (Dao-AILab/quack), whose kernels import on a GPU alone: ours are all that is there of it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tools.peers.sources import functions_of
from tools.peers.suites.losses import cross_entropy, head_of, token_stats
from tools.peers.suites.suite import Suite, no_counterpart


def _cross_entropy(
    x: Tensor, target: Tensor, lse_partial: Tensor | None = None, weight: Tensor | None = None,
    ignore_index: int = -100, reduction: str = "mean", inplace_backward: bool = False,
) -> Tensor:  # fmt: skip
    if lse_partial is not None:
        no_counterpart("log-sum-exps of parts that the caller has")
    loss, _ = cross_entropy(x, head_of(x), target, class_weights=weight, ignore_index=ignore_index, reduction=reduction)
    return loss


def _forward(
    x: Tensor, target: Tensor, target_logit: Tensor | None = None, weight: Tensor | None = None,
    ignore_index: int = -100, return_lse: bool = False, return_dx: bool = False, inplace_backward: bool = False,
) -> Any:  # fmt: skip
    if inplace_backward:
        no_counterpart("a gradient in the place of the logits")
    mask = target != ignore_index
    ids = target.masked_fill(~mask, 0)
    factors = mask.float() if weight is None else weight[ids] * mask
    x = x.detach().requires_grad_(return_dx)
    stats = token_stats(x, head_of(x), ids)
    losses = -factors * stats.log_probs
    results = [losses.detach(), *([stats.logsumexp.detach()] if return_lse else [])]
    if return_dx:
        results += torch.autograd.grad(losses.sum(), x)
    return tuple(results) if len(results) > 1 else results[0]


def _backward(x: Tensor, target: Tensor, dloss: Tensor, lse: Tensor, **options: Any) -> Tensor:
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(_cross_entropy(x, target, reduction="none", **options), x, dloss)
    return gradient


def _linear(
    x: Tensor, weight: Tensor, target: Tensor, chunk_size: int = 4096, ignore_index: int = -100,
    reduction: str = "mean", **_: object,
) -> Tensor:  # fmt: skip
    return cross_entropy(x, weight, target, ignore_index=ignore_index, reduction=reduction)[0]


def _shrink(parameters: Mapping[str, Any], smallest: bool, name: str) -> Mapping[str, Any]:
    """Rows, and the vocabulary, whose square is the head of functions that take logits."""
    most = {"M": 13, "N": 100, "V": 100, "d": 32, "B_L": 24} if smallest else {"M": 77, "N": 1000, "V": 2048, "d": 256}
    return {name: min(parameters[name], most[name]) for name in most if name in parameters}


def _prepare() -> None:
    """The reference of their tests, which stands beside their kernels."""
    name = "linear_cross_entropy_func_ref"
    found = functions_of(Path("quack/linear_cross_entropy.py"), [name], F=functional)
    setattr(importlib.import_module("quack.linear_cross_entropy"), name, getattr(found, name))


SUITE = Suite(
    peer="QuACK",
    paths=(".",),
    tests=("tests/test_cross_entropy.py", "tests/test_linear_cross_entropy.py"),
    stand_ins={
        "quack.cross_entropy:cross_entropy": _cross_entropy,
        "quack.cross_entropy:cross_entropy_fwd": _forward,
        "quack.cross_entropy:cross_entropy_bwd": _backward,
        "quack.linear_cross_entropy:chunked_linear_cross_entropy": _linear,
        "quack.linear_cross_entropy:scaled_exp_linear_cross_entropy": _linear,
        "quack.linear_cross_entropy:scaled_exp_lce_supported": lambda *_: True,
    },
    without=(
        (r"lse_partial", "log-sum-exps of parts that the caller has"),
        (r"torch_compile_dispatch", "which of their kernels is taken"),
    ),
    shrink=_shrink,
    absent=("quack",),
    conftest=False,
    asks_for_cuda=True,
    prepare=_prepare,
)  # fmt: skip
