"""``torch.nn.functional.linear_cross_entropy``; its chunked form has no loss per token, so this is the other one."""

from __future__ import annotations

from torch import Tensor, nn

from srpo_kernels.verify.batches import Batch
from srpo_kernels.verify.providers import Step, Unsupported, cross_entropies, naive


def prepare(batch: Batch) -> Step:
    if not hasattr(nn.functional, "linear_cross_entropy"):
        raise Unsupported("this torch has no linear_cross_entropy")
    naive.require_memory(batch)
    return cross_entropies.prepare(_cross_entropies, batch)


def _cross_entropies(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
    return nn.functional.linear_cross_entropy(hidden, weight, target_ids, reduction="none")
