"""This library."""

from __future__ import annotations

from torch import Tensor

import srpo_kernels as sk
from benchmarks.cases import CONFIG, Batch
from benchmarks.providers import Step, autograd_step
from srpo_kernels import rows_torch
from srpo_kernels.engine.plan import RowMemory


def loss(batch: Batch) -> Tensor:
    distills = bool(batch.sdpo_mask.any())
    return sk.srpo_loss(
        batch.hidden,
        batch.weight,
        batch.target_ids,
        advantages=batch.advantages,
        mask=batch.mask,
        sdpo_mask=batch.sdpo_mask if distills else None,
        teacher_hidden=batch.teacher_hidden if distills else None,
        old_log_probs=batch.old_log_probs,
        config=CONFIG,
    ).loss


def prepare(batch: Batch) -> Step:
    return autograd_step(loss, batch)


def peak_limit(batch: Batch) -> float:
    """Bytes beside the inputs that a call may hold at a time: the default workspace and dW, plus 5 %.

    The same for any number of rows.
    """
    memory = RowMemory.of(batch.weight, batch.weight.dtype, rows_torch)
    models = 2 if batch.sdpo_mask.any() else 1
    rows = models * memory.capacity(models, None) + memory.scratch.blocks * memory.scratch.rows
    workspace = rows * memory.vocab_size * memory.itemsize
    return 1.05 * (workspace + batch.weight.nbytes)
