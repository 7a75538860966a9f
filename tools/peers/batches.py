"""Random batches, and how two functions of one are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import srpo_kernels as sk

# A mean of token losses, which are around 1, may be nearly 0: it is rounded at their size.
_LEAST_SCALE = 1.0


class Batch(NamedTuple):
    """Padded rows ``[B, T]`` in fp32; every sequence has a valid token. ``advantages`` are per sequence."""

    log_probs: Tensor
    old_log_probs: Tensor
    other_log_probs: Tensor
    advantages: Tensor
    mask: Tensor


# From a batch and log-probs that require a gradient, to a tensor: a loss, losses, or weights.
Function = Callable[[Batch, Tensor], Tensor]


@dataclass(frozen=True)
class Comparison:
    """One function of a peer and ours. ``values``: its result counts; ``gradients``: that of its sum does."""

    peer: str
    theirs: str
    ours: str
    their_function: Function
    our_function: Function
    values: bool = True
    gradients: bool = True


def make_batch(seed: int) -> Batch:
    """Log-ratios on both sides of every clip, advantages of both signs and 0."""
    generator = torch.Generator().manual_seed(seed)
    size, length = 5, 12

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    log_probs = -normal(size, length).abs() * 2.0 - 0.05
    lengths = torch.randint(1, length + 1, (size, 1), generator=generator)
    return Batch(
        log_probs,
        (log_probs + 0.3 * normal(size, length)).clamp(max=-1e-3),
        (log_probs + 0.5 * normal(size, length)).clamp(max=-1e-3),
        normal(size) * (torch.rand(size, generator=generator) < 0.8),
        torch.arange(length) < lengths,
    )


def compare(comparison: Comparison, batches: int) -> dict[str, float]:
    """The largest differences, relative to the largest element."""
    worst: dict[str, float] = {}
    for seed in range(batches):
        batch = make_batch(seed)
        results = [_run(function, batch) for function in (comparison.their_function, comparison.our_function)]
        for name, wanted, theirs, ours in zip(
            ("value", "gradient"), (comparison.values, comparison.gradients), *results, strict=True
        ):
            if wanted:
                scale = max(float(theirs.abs().max()), _LEAST_SCALE)
                worst[name] = max(worst.get(name, 0.0), float((ours - theirs).abs().max()) / scale)
    return worst


def token_losses(config: sk.SRPOConfig, batch: Batch, log_probs: Tensor) -> Tensor:
    """Ours, ``[B, T]``, 0 where masked."""
    return sk.policy_loss(
        log_probs, batch.advantages, mask=batch.mask, old_log_probs=batch.old_log_probs, config=config
    ).loss


def token_mean(losses: Tensor, mask: Tensor) -> Tensor:
    return losses.sum() / mask.sum()


def sequence_mean(losses: Tensor, mask: Tensor) -> Tensor:
    return (losses.sum(1) / mask.sum(1)).mean()


def _run(function: Function, batch: Batch) -> tuple[Tensor, Tensor]:
    log_probs = batch.log_probs.clone().requires_grad_()
    value = function(batch, log_probs)
    gradient = torch.zeros_like(log_probs)
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value.sum(), log_probs)
    return value.detach(), gradient
