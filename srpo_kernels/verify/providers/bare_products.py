"""The matrix products that no implementation can avoid, and nothing else: what all times are divided by.

In the form that suits them best: active rows only, gathered beforehand, all at once, into buffers that exist, in the
model's dtype.
"""

from __future__ import annotations

import math

import torch

from srpo_kernels.verify.batches import Batch
from srpo_kernels.verify.providers import Result, Step


def prepare(batch: Batch) -> Step:
    sdpo_rows, weight = batch.sdpo_rows, batch.weight.detach()
    hidden = batch.hidden.detach()[sdpo_rows | batch.active_policy_rows]
    # Of a teacher that is its likeliest tokens nothing is left to multiply.
    teacher_hidden = batch.teacher_hidden[sdpo_rows][: 0 if batch.topk_ids is not None else None]
    logits = weight.new_empty(len(hidden), len(weight))
    teacher_logits = weight.new_empty(len(teacher_hidden), len(weight))
    nothing = torch.tensor(math.nan)

    def step() -> Result:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(teacher_hidden, weight.t(), out=teacher_logits)
        return Result(nothing, logits @ weight, logits.t() @ hidden, None)

    return step
