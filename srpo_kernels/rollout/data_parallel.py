"""What trainers on several ranks put around a loss: averages of gradients, and forwards with hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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
        module: an ``nn.Module``, bare or in wrappers: DDP, FSDP, ``torch.compile`` or another whose only child is
            ``module``. The call goes through the wrappers; it is the innermost forward that ``function`` replaces, of a
            PEFT model its own. What is compiled around ``function`` runs eagerly: compile ``function``, or what it
            calls.
        function: reads the parameters while it runs; the module's own ``forward`` is in its place again by then.

    Returns:
        What ``function`` returned, after the hooks.

    Raises:
        TypeError: ``module`` is not an ``nn.Module``, or ``function`` cannot be called.
        ValueError: a wrapper that would run the forward of a copy, or again in the backward (DataParallel on several
            devices, activation checkpointing), or a DDP module within ``module``, whose hooks the call would not pass.
        RuntimeError: the call of ``module`` did not come to the forward.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    if not callable(function):
        raise TypeError(f"function must be callable, got {type(function).__name__}")
    chain = _unwrapped(module)
    attributes = [vars(link) for link in chain]
    # What somebody set on the instances, where they did; the class has the other forward.
    own = [{name: values[name] for name in _CALLED if name in values} for values in attributes]

    def restore() -> None:
        for values, kept in zip(attributes, own, strict=True):
            for name in _CALLED:
                values.pop(name, None)
            values.update(kept)

    def forward(*args: Any, **kwargs: Any) -> T:
        restore()
        return function(*args, **kwargs)

    for link, values in zip(chain, attributes, strict=True):
        values.pop("_compiled_call_impl", None)
        if _COMPILED in link._modules:
            # Compiled code may be that of the module's own forward.
            values["forward"] = link._modules[_COMPILED]
    attributes[-1]["forward"] = forward
    try:
        result: T = module(*args, **kwargs)
        if attributes[-1].get("forward") is forward:
            raise RuntimeError(
                f"module must call the forward of its {type(chain[-1]).__name__} when it is called: this "
                f"{type(module).__name__} did not, and function has not run"
            )
    finally:
        restore()
    return result


# The child that `torch.compile` wraps, and those of other wrappers: DDP and DeepSpeed, FSDP1, activation checkpointing.
_COMPILED = "_orig_mod"
_CHECKPOINTED = "_checkpoint_wrapped_module"
_WRAPPED = (_COMPILED, "module", "_fsdp_wrapped_module", _CHECKPOINTED)
# What a module is called through, where an instance has its own; `nn.Module.compile` sets the latter.
_CALLED = ("forward", "_compiled_call_impl")


def _unwrapped(module: nn.Module) -> list[nn.Module]:
    """``module`` and what it wraps, down to what is no wrapper. Raises ValueError where a forward is not all there is.

    A wrapper's only child has one of the names that wrappers give it.
    """
    chain = [module]
    while len(children := chain[-1]._modules) == 1 and (name := next(iter(children))) in _WRAPPED:
        child = children[name]
        if child is None:
            break
        if name == _CHECKPOINTED:
            raise ValueError("module must not be in a checkpoint wrapper, which would run its own forward again")
        if isinstance(chain[-1], nn.DataParallel) and len(chain[-1].device_ids) > 1:
            raise ValueError(
                f"module must not be in DataParallel on several devices, got {chain[-1].device_ids}: function would "
                "run once per copy, with the parameters of the first; DistributedDataParallel is supported"
            )
        chain.append(child)
    for name, within in chain[-1].named_modules():
        if within is not chain[-1] and isinstance(within, DistributedDataParallel):
            raise ValueError(
                f"module must not hold a DistributedDataParallel, got one at {name!r} of {type(chain[-1]).__name__}: "
                "the call would not pass its hooks, which reduce the gradients; give that module"
            )
    return chain
