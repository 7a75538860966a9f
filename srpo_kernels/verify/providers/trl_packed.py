"""TRL's chunked functions on the valid rows alone: the form that suits them best."""

from __future__ import annotations

from srpo_kernels.verify.batches import Batch
from srpo_kernels.verify.providers import Step, Unsupported, trl_kernels


def prepare(batch: Batch) -> Step:
    if batch.mask.all():
        raise Unsupported("as trl: no padding to drop")
    return trl_kernels.prepare(batch, packed=True)
