"""TRL's chunked functions on the valid rows alone: the form that suits them best."""

from __future__ import annotations

from benchmarks.cases import Batch
from benchmarks.providers import Step, trl_kernels


def prepare(batch: Batch) -> Step:
    return trl_kernels.prepare(batch, packed=True)
