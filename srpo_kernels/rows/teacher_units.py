"""A teacher whose logit transform is its own: its logits in the student's units, which the row passes take."""

from __future__ import annotations

from torch import Tensor

from srpo_kernels.rows.spec import RowSpec
from srpo_kernels.rows.torch_blocks import blocks, to_units_


def to_student_units_(logits: Tensor, spec: RowSpec) -> Tensor:
    """Turn the raw logits of a teacher ``[n, V]`` into units of the student's, in place: nothing where they are.

    A softcap of the student's is none of theirs: ``RowSpec.teacher_transform`` says so to the passes.
    """
    own = spec.own_teacher
    if own is None or not len(logits):
        return logits
    ratio = own.nats_per_unit / spec.transform.nats_per_unit
    if logits.is_cpu:
        # A block at a time, which stays in the cache from one operation to the next.
        for rows, _ in blocks(logits, 0, buffers=1):
            _scale_(logits[rows], spec, ratio)
    else:
        _scale_(logits, spec, ratio)
    return logits


def _scale_(logits: Tensor, spec: RowSpec, ratio: float) -> None:
    assert spec.own_teacher is not None
    to_units_(logits, spec.own_teacher)
    logits.mul_(ratio)
