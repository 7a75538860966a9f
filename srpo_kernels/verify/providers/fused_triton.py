"""This library with the Triton backend."""

from __future__ import annotations

from srpo_kernels.verify.batches import Batch
from srpo_kernels.verify.providers import Step, Unsupported, fused


def prepare(batch: Batch) -> Step:
    if batch.hidden.is_cpu:
        raise Unsupported("needs a GPU")
    return fused.prepare(batch, "triton")
