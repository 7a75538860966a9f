"""This library."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import srpo_kernels as sk
from srpo_kernels.engine.memory import RowMemory
from srpo_kernels.rows import torch_rows
from srpo_kernels.rows.dtypes import accumulation_dtype
from srpo_kernels.rows.passes import RowPasses
from srpo_kernels.rows.vocabulary import Vocabulary
from srpo_kernels.verify.batches import DTYPES, Batch, Case
from srpo_kernels.verify.providers import Step, autograd_step


def loss(batch: Batch, backend: str = "torch") -> tuple[Tensor, Tensor]:
    out = sk.srpo_loss(
        batch.hidden,
        batch.weight,
        batch.target_ids,
        advantages=batch.advantages,
        mask=batch.mask,
        sdpo_mask=batch.sdpo_mask if batch.distills else None,
        teacher_hidden=batch.teacher_hidden if batch.distills else None,
        old_log_probs=batch.old_log_probs,
        config=batch.config,
        backend=backend,
    )
    return out.loss, out.log_probs


def prepare(batch: Batch, backend: str = "torch") -> Step:
    return autograd_step(partial(loss, backend=backend), batch)


def peak_limit(case: Case) -> float:
    """Bytes beside the inputs that a call on a CPU may hold at a time, plus 5 %; the same for any number of rows.

    They are the default workspace and dW, which is summed in the accumulation dtype and handed over in the weight's.
    """
    # Its pages are never touched.
    weight = torch.empty(case.vocabulary, case.hidden_size, dtype=DTYPES[case.dtype])
    dtype = accumulation_dtype(weight)
    memory = RowMemory.of(weight, dtype, RowPasses(torch_rows, Vocabulary.whole(len(weight))))
    models = 1 if case.workload == "policy" else 2
    rows = models * memory.capacity(models, None) + memory.scratch.blocks * memory.scratch.rows
    sums = dtype.itemsize * (rows * len(weight) + weight.numel())
    return 1.05 * (sums + (weight.nbytes if weight.dtype != dtype else 0))
