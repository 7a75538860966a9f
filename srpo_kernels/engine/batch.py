"""What the engine works on: a flattened batch, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from srpo_kernels.losses.sequences import Sequences
from srpo_kernels.rows.contract import Support


class Head(NamedTuple):
    """An LM head: ``weight`` ``[V, H]`` and ``bias`` ``[V]``."""

    weight: Tensor
    bias: Tensor | None


class Batch(NamedTuple):
    """N rows. Only ``hidden`` ``[N, H]`` and ``head`` carry gradient.

    ``inputs`` are the objective's, ``[N]`` by name; ``sequences`` is None where none matters. ``teacher_rows`` ``[N]``
    says where in ``teacher_hidden`` ``[M, H_t]``, or in ``teacher_support``, a row's teacher is, ``head_ids`` ``[N]``
    which of the ``teacher_heads`` it has, None for the only one; all unused when no row has a teacher. ``support_ids``
    ``[N, S]``: the tokens that rows were sampled from, in ``srpo_loss`` those without a teacher; ``inputs`` then say
    where in them a row's own token is.
    """

    hidden: Tensor
    head: Head
    target_ids: Tensor
    inputs: Mapping[str, Tensor]
    sequences: Sequences | None
    teacher_hidden: Tensor | None
    teacher_rows: Tensor
    teacher_heads: list[Head]
    head_ids: Tensor | None = None
    teacher_support: Support | None = None
    support_ids: Tensor | None = None


class Needs(NamedTuple):
    """Which gradients the caller wants."""

    hidden: bool
    weight: bool
    bias: bool


class FusedResult(NamedTuple):
    """Loss, each row's share of it and log-prob ``[N]``, how many rows went wrong, and the loss's gradients.

    ``nonfinite_rows`` counts those whose loss or gradient is not finite. Gradients are in the accumulation dtype, and
    still to be multiplied by ``grad_scale`` ``[]``, None for 1.
    """

    loss: Tensor
    losses: Tensor
    log_probs: Tensor
    nonfinite_rows: Tensor
    grad_hidden: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None
    grad_scale: Tensor | None
