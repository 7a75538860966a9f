"""The matrix products that no implementation can avoid, and nothing else: what all times are divided by.

In the form that suits them best: active rows only, gathered beforehand, all at once, into buffers that exist.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases import Batch
from benchmarks.providers import Step


def prepare(batch: Batch) -> Step:
    sdpo_rows, weight = batch.sdpo_rows, batch.weight.detach()
    hidden = batch.hidden.detach()[sdpo_rows | batch.active_policy_rows]
    teacher_hidden = batch.teacher_hidden[sdpo_rows]
    logits = torch.empty(len(hidden), len(weight))
    teacher_logits = torch.empty(len(teacher_hidden), len(weight))

    def step() -> tuple[Tensor, ...]:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(teacher_hidden, weight.t(), out=teacher_logits)
        return logits @ weight, logits.t() @ hidden

    return step
