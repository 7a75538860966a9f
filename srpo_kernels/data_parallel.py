"""What trainers on several ranks put around a loss: averages of gradients, and forwards with hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from srpo_kernels.checks import FLOATING, require_count, require_tensor

T = TypeVar("T")


def scale_for_gradient_mean(loss: Tensor, *, world_size: int | None = None, accumulation_steps: int = 1) -> Tensor:
    """A micro-batch's loss times what the trainer will divide its gradient by.

    ``loss * world_size * accumulation_steps``. With the ``Normalizers`` of the whole optimizer batch, losses and
    gradients of micro-batches and ranks add up to those of the batch; DDP and FSDP take the mean over ranks instead
    of the sum, and some trainers the mean over micro-batches as well. The product is for ``backward`` alone: what a
    log wants is the sum of the losses as they were.

    Args:
        loss: floating, of any shape; carries gradient.
        world_size: the ranks that gradients are averaged over: those of DDP's group or of FSDP's whole mesh, not the
            ranks of a vocabulary-parallel group, which share their rows. None: every rank of the default group, or 1
            without one. 1 where gradients are added up, as after ``set_gradient_divide_factor(1.0)``.
        accumulation_steps: what the trainer divides a micro-batch's loss by, such as
            ``accelerator.gradient_accumulation_steps``. 1 in a loop that calls ``loss.backward()`` itself.

    Returns:
        ``loss``'s shape and dtype; carries gradient.

    Raises:
        TypeError: ``loss`` is not a floating tensor, or a count is not an int.
        ValueError: a count below 1.
    """
    require_tensor("loss", loss, FLOATING)
    if world_size is None:
        world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    require_count("world_size", world_size)
    require_count("accumulation_steps", accumulation_steps)
    return loss * (world_size * accumulation_steps)


def call_as_forward(module: nn.Module, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """``function(*args, **kwargs)``, called as the forward of ``module``: between all of its hooks.

    DDP, FSDP and ZeRO-3 prepare a module's parameters before its forward, and reduce their gradients after its
    backward. A loss from ``lm_head.weight`` needs both without the logits that the head's own forward would return.
    Give the root, with a function that computes hidden states and loss; or, where the head is sharded apart from the
    rest, ``model.lm_head`` with a function of the hidden states.

    Hooks see the arguments and the results: what the hidden states carry gradient to has to be an argument, and FSDP
    casts floating arguments to its ``param_dtype``. Log-probs, advantages and normalizers keep their precision when
    ``function`` holds them itself. ``module`` must not be called by another thread meanwhile.

    Args:
        module: an ``nn.Module``, bare or in DDP or another wrapper whose only child is ``module``. The call goes
            through the wrappers; it is the innermost forward that ``function`` replaces.
        function: reads the parameters while it runs; the module's own ``forward`` is in its place again by then.

    Returns:
        What ``function`` returned, after the hooks.

    Raises:
        TypeError: ``module`` is not an ``nn.Module``.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    attributes = _innermost(module).__dict__
    # A forward that somebody set on the instance, where there is one; the class has the other.
    own = {"forward": attributes["forward"]} if "forward" in attributes else {}

    def restore() -> None:
        attributes.pop("forward", None)
        attributes.update(own)

    def forward(*args: Any, **kwargs: Any) -> T:
        restore()
        return function(*args, **kwargs)

    attributes["forward"] = forward
    try:
        result: T = module(*args, **kwargs)
    finally:
        restore()
    return result


def _innermost(module: nn.Module) -> nn.Module:
    """What ``module`` wraps: a wrapper's only child is its ``module``."""
    inner = getattr(module, "module", None)
    if isinstance(inner, nn.Module) and [*module.children()] == [inner]:
        return _innermost(inner)
    return module
