"""What the engine's operations have in common.

A compiler sees operators that it cannot look into: how many rows are computed, and in what chunks, is no part of its
graph. Eager calls run the same implementations as an ``autograd.Function`` each, so that profilers and dispatch modes
see the products, and no call has to import the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from srpo_kernels.engine.arguments import LossArguments, LossOptions, StatsArguments, StatsOptions
from srpo_kernels.engine.batch import Needs

Implementation = Callable[..., tuple[Tensor, ...]]
Backward = Callable[..., tuple[Tensor | None, ...]]

# The host reads what it has to launch: no CUDA graph can hold that.
TAGS = (torch.Tag.cudagraph_unsafe,)
# Parts of schemas: what every operation ends its arguments with, and what a backward returns.
NEEDS = "bool needs_hidden, bool needs_weight, bool needs_bias"
GRADIENTS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias"


def run(
    operator: Implementation,
    function: type[torch.autograd.Function],
    call: LossArguments | StatsArguments,
    options: LossOptions | StatsOptions,
) -> tuple[Tensor, ...]:
    """Run ``operator`` where the call is ``traced``, ``function`` elsewhere.

    The first three tensors of ``call`` are hidden states, weight and bias; no other carries gradient.
    """
    grad = torch.is_grad_enabled()
    needs = Needs(*(grad and x is not None and x.requires_grad for x in call[:3]))
    others = [_detached(x) for x in call[3:]]
    outputs: tuple[Tensor, ...] = (operator if traced(call) else function.apply)(*call[:3], *others, *options, *needs)
    return outputs


def traced(call: LossArguments | StatsArguments) -> bool:
    """Whether a compiler traces the call, or its tensors have no data."""
    return torch.compiler.is_compiling() or isinstance(call.hidden, FakeTensor)


def _detached(value: Any) -> Any:
    if isinstance(value, list):
        return [_detached(x) for x in value]
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value


def dense(values: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """An operator returns no None: an empty tensor stands for it."""
    return tuple(like.new_empty(0) if x is None else x for x in values)


class _NotTwice(torch.autograd.Function):
    """The last tensors as they are, in a graph that leads to the ``sources`` and cannot be followed."""

    @staticmethod
    def forward(num_sources: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors[num_sources:]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError("srpo_loss and token_stats cannot be differentiated twice")


def once_differentiable(backward: Backward, source: int) -> Backward:
    """``backward(ctx, saved, *upstream)`` as a backward whose results refuse to be differentiated.

    Of what was saved, ``source`` is an output. PyTorch's own decorator refuses only where the upstream gradient
    requires a gradient: elsewhere, in a plain ``create_graph`` or under ``torch.func``, a second derivative would
    silently be 0.
    """

    def run(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        # Once: gradient checkpointing computes saved tensors again, and hands each out a single time.
        saved = ctx.saved_tensors
        with torch.no_grad():
            results = backward(ctx, saved, *upstream)
        if not torch.is_grad_enabled():
            return results
        sources = [saved[source], *(x for x in upstream if x is not None)]
        marked = iter(_NotTwice.apply(len(sources), *sources, *(x for x in results if x is not None)))
        return tuple(None if x is None else next(marked) for x in results)

    return run


def with_autograd(implementation: Implementation) -> Implementation:
    """The dispatcher calls an operator's implementation with autograd switched off; this one needs its own."""

    def run(*arguments: Any) -> tuple[Tensor, ...]:
        key = torch._C.DispatchKey
        autograd = torch._C.DispatchKeySet(key.AutogradFunctionality)
        autograd = autograd.add(key.AutogradOther).add(key.AutogradNestedTensor)
        included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
        with torch._C._ForceDispatchKeyGuard(included, excluded - autograd), torch.no_grad():
            return implementation(*arguments)

    return run
