"""Apple's cut cross-entropy: its kernel on a GPU, its portable form under ``torch.compile`` elsewhere."""

from __future__ import annotations

import torch
from cut_cross_entropy import linear_cross_entropy
from torch import Tensor

from srpo_kernels.verify.batches import Batch
from srpo_kernels.verify.providers import Step, cross_entropies
from srpo_kernels.verify.providers.naive_compiled import require_compiler


def prepare(batch: Batch) -> Step:
    require_compiler(batch)
    torch._dynamo.reset()
    implementation, softcap = "cce" if batch.hidden.is_cuda else "torch_compile", batch.config.softcap

    def losses(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
        result: Tensor = linear_cross_entropy(
            hidden, weight, target_ids, softcap=softcap, reduction="none", impl=implementation
        )
        return result

    return cross_entropies.prepare(losses, batch, softcap=True)
