"""What the engine works on: a flattened batch, and what comes back."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from srpo_kernels.losses.objective import RowInputs


class Head(NamedTuple):
    """An LM head: ``weight`` ``[V, H]`` and ``bias`` ``[V]``."""

    weight: Tensor
    bias: Tensor | None


class Batch(NamedTuple):
    """N rows. Only ``hidden`` ``[N, H]`` and ``head`` carry gradient.

    ``teacher_rows`` ``[N]`` says where in ``teacher_hidden`` ``[M, H_t]`` a row's teacher state is;
    both are unused when no row is distilled. ``factors`` ``[N]``
    is each row's share of the loss. ``log_mean`` is the log-mean of the entropy weights; None when it is this batch's.
    """

    hidden: Tensor
    head: Head
    target_ids: Tensor
    inputs: RowInputs
    factors: Tensor
    log_mean: Tensor | None
    teacher_hidden: Tensor | None
    teacher_rows: Tensor
    teacher_head: Head


class Needs(NamedTuple):
    """Which gradients the caller wants."""

    hidden: bool
    weight: bool
    bias: bool


class FusedResult(NamedTuple):
    """Loss, log-probs ``[N]``, metrics, and the gradients of the loss in the accumulation dtype."""

    loss: Tensor
    log_probs: Tensor
    metrics: dict[str, Tensor]
    grad_hidden: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None
