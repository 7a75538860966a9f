"""This library with the Triton backend."""

from __future__ import annotations

from benchmarks.cases import Batch
from benchmarks.providers import Step, Unsupported, fused


def prepare(batch: Batch) -> Step:
    if not batch.hidden.is_cuda:
        raise Unsupported("needs a GPU")
    return fused.prepare(batch, "triton")
