"""Ways to compute the loss of a batch and its gradients. Each is a module with ``prepare(batch) -> Step``."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Literal, get_args

from torch import Tensor

from benchmarks.cases import Batch

ProviderName = Literal["bare", "srpo_kernels", "naive", "trl"]
PROVIDERS: tuple[ProviderName, ...] = get_args(ProviderName)

_MODULES: dict[ProviderName, str] = {
    "bare": "bare_products",
    "srpo_kernels": "fused",
    "naive": "naive",
    "trl": "trl_kernels",
}


# Forward and backward, any number of times: the loss, dX and dW. Bare products have no loss to deliver.
Step = Callable[[], tuple[Tensor, ...]]


def prepare(name: ProviderName, batch: Batch) -> Step:
    """The step of one provider on one batch.

    Imports the provider's module only here, so that one that is not wanted need not be installed.
    """
    step: Step = import_module(f"{__name__}.{_MODULES[name]}").prepare(batch)
    return step


def autograd_step(loss_function: Callable[[Batch], Tensor], batch: Batch) -> Step:
    """Forward and ``backward()`` as a trainer calls them; the gradients leave the batch with the result."""

    def step() -> tuple[Tensor, ...]:
        loss = loss_function(batch)
        loss.backward()
        grad_hidden, grad_weight = batch.hidden.grad, batch.weight.grad
        if grad_hidden is None or grad_weight is None:
            raise RuntimeError("the loss is not attached to hidden and weight")
        batch.hidden.grad = batch.weight.grad = None
        return loss.detach(), grad_hidden, grad_weight

    return step
