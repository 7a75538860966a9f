"""QuACK's cross-entropy on full logits."""

from __future__ import annotations

from torch import Tensor

from srpo_kernels.verify.batches import Batch
from srpo_kernels.verify.providers import Step, Unsupported, cross_entropies


def prepare(batch: Batch) -> Step:
    if not batch.hidden.is_cuda:
        raise Unsupported("needs a GPU")
    from quack.cross_entropy import cross_entropy

    def losses(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
        result: Tensor = cross_entropy(hidden @ weight.T, target_ids, reduction="none", inplace_backward=True)
        return result

    return cross_entropies.prepare(losses, batch)
