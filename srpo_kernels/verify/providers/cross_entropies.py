"""GRPO's loss from the cross-entropies of other libraries: a token's log-prob is minus its cross-entropy."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from srpo_kernels.verify.batches import Batch
from srpo_kernels.verify.providers import Step, Unsupported, autograd_step
from srpo_kernels.verify.providers.naive import policy_losses

# Hidden states ``[n, H]``, the head ``[V, H]`` and targets ``[n]`` to cross-entropies ``[n]``.
CrossEntropies = Callable[[Tensor, Tensor, Tensor], Tensor]


def prepare(cross_entropies: CrossEntropies, batch: Batch, *, softcap: bool = False) -> Step:
    """The policy loss of a batch without distillation rows; ``softcap`` says that the function applies one."""
    if batch.distills:
        raise Unsupported("log-probs alone: no divergence")
    if batch.config.softcap is not None and not softcap:
        raise Unsupported("no softcap")

    def loss(batch: Batch) -> tuple[Tensor, Tensor]:
        per_token = cross_entropies(batch.hidden.flatten(0, 1), batch.weight, batch.target_ids.flatten())
        log_probs = -per_token.view_as(batch.target_ids).float()
        losses = policy_losses(log_probs, batch.old_log_probs, batch.advantages[:, None], batch.config)
        return (losses * batch.mask).sum() / batch.mask.sum(), log_probs

    return autograd_step(loss, batch)
