"""This library."""

from __future__ import annotations

from torch import Tensor

import srpo_kernels as sk
from benchmarks.cases import CONFIG, Batch
from benchmarks.providers import Step, autograd_step
from srpo_kernels.engine.plan import chunk_capacity
from srpo_kernels.rows_torch import SCRATCH_BLOCKS, block_rows


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
    vocab_size, itemsize, device = len(batch.weight), batch.weight.itemsize, batch.weight.device
    models = 2 if batch.sdpo_mask.any() else 1
    logits_rows = models * chunk_capacity(vocab_size, itemsize, models, None, device)
    scratch_rows = SCRATCH_BLOCKS * block_rows(vocab_size, device)
    workspace = (logits_rows + scratch_rows) * vocab_size * itemsize
    return 1.05 * (workspace + batch.weight.nbytes)
