"""The naive loss under ``torch.compile``."""

from __future__ import annotations

import shutil

import torch

from srpo_kernels.verify.batches import Batch
from srpo_kernels.verify.providers import Step, Unsupported, autograd_step, naive

_COMPILED = naive.Buffers(4, 6)


def prepare(batch: Batch) -> Step:
    require_compiler(batch)
    naive.require_memory(batch, _COMPILED)
    torch._dynamo.reset()
    return autograd_step(torch.compile(naive.loss), batch)


def require_compiler(batch: Batch) -> None:
    """Raise Unsupported on a CPU without a C++ compiler."""
    if not batch.hidden.is_cuda and shutil.which("g++") is None and shutil.which("clang++") is None:
        raise Unsupported("torch.compile needs a C++ compiler on a CPU")
