"""Ways to compute the loss of a batch and its gradients. Each is a module with ``prepare(batch) -> Step``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from srpo_kernels.verify.batches import Batch
from srpo_kernels.verify.kinds import ProviderName


class Result(NamedTuple):
    """What a step returns; ``log_probs`` ``[B, T]`` where the provider has them, 0 at rows that it did not compute."""

    loss: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor
    log_probs: Tensor | None


# Forward and backward, any number of times. Bare products have no loss to deliver: NaN.
Step = Callable[[], Result]


class Unsupported(Exception):
    """A provider cannot do a case; says why."""


class Provider(NamedTuple):
    """A module of this package, what it is in words, and whether it knows the weights of distilled tokens."""

    module: str
    meaning: str
    weighted: bool = True


REGISTRY: dict[ProviderName, Provider] = {
    "bare": Provider("bare_products", "the products of the active rows and nothing else"),
    "srpo_kernels": Provider("fused", "this library with the torch backend"),
    "srpo_kernels-triton": Provider("fused_triton", "this library with the Triton backend"),
    "naive": Provider("naive", "full logits in eager torch, every row"),
    "naive-compiled": Provider("naive_compiled", "the same under torch.compile"),
    "trl": Provider("trl_kernels", "TRL's chunked log-probs and divergence, called as its trainers do on this device"),
    "trl-packed": Provider("trl_packed", "the same functions, with padding dropped on every device"),
    "liger": Provider(
        "liger", "Liger's chunked GRPO and chunked JSD; it has no weights per token: plain sum of divergences", False
    ),
    "linear_cross_entropy": Provider("torch_cross_entropy", "torch.nn.functional.linear_cross_entropy, per token"),
    "cut_cross_entropy": Provider("cut_cross_entropy", "cut_cross_entropy, per token"),
    "flash-attn": Provider("flash_attn", "flash-attn's Triton cross-entropy on full logits"),
    "quack": Provider("quack", "QuACK's cross-entropy on full logits"),
}


def prepare(name: ProviderName, batch: Batch) -> Step:
    """The step of one provider on one batch.

    Imports the provider's module only here, so that one that is not wanted need not be installed. Raises Unsupported
    where it cannot do the batch.
    """
    try:
        step: Step = importlib.import_module(f"{__name__}.{REGISTRY[name].module}").prepare(batch)
    except ImportError as error:
        raise Unsupported(f"not installed: {error.name}") from error
    return step


def autograd_step(loss_function: Callable[[Batch], tuple[Tensor, Tensor | None]], batch: Batch) -> Step:
    """Forward and ``backward()`` as a trainer calls them; the gradients leave the batch with the result."""

    def step() -> Result:
        loss, log_probs = loss_function(batch)
        loss.backward()
        grad_hidden, grad_weight = batch.hidden.grad, batch.weight.grad
        if grad_hidden is None or grad_weight is None:
            raise RuntimeError("the loss is not attached to hidden and weight")
        batch.hidden.grad = batch.weight.grad = None
        return Result(loss.detach(), grad_hidden, grad_weight, None if log_probs is None else log_probs.detach())

    return step
