"""Rows of which a few tokens matter: their columns of the head in place of all of it.

A row with K tokens costs ``6 K H`` FLOP and reads its ``K H`` numbers of the head twice; dW is added to row by row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from srpo_kernels.engine.batch import Head
from srpo_kernels.engine.gemm import HeadGradient
from srpo_kernels.rows.contract import LOWEST, LogitTransform, RowGradients, RowSpec, Statistics
from srpo_kernels.rows.passes import coefficients
from srpo_kernels.rows.vocabulary import Vocabulary

# Where the head has fewer rows for each token of a support, a whole row of logits is cheaper: the gathered columns of a
# row serve that row alone.
_ROWS_PER_TOKEN = 32
# Elements of the gathered columns of a few rows: 64 MiB in fp32.
_ELEMENTS = 1 << 24


def cheaper(tokens: int, vocab_size: int) -> bool:
    """Whether rows of ``tokens`` tokens cost less by their columns."""
    return (tokens + 1) * _ROWS_PER_TOKEN <= vocab_size


class Columns(NamedTuple):
    """n rows: hidden states ``[n, H]`` in the accumulation dtype, ids ``[n, K + 1]`` of the whole vocabulary.

    The last id is the row's own where it is none of the K; a negative id is none. ``slopes`` are those of the logit
    transform at these tokens. ``statistics`` are of the policy over them.
    """

    hidden: Tensor
    ids: Tensor
    slopes: Tensor
    statistics: Statistics


def compute(
    hidden: Tensor,
    head: Head,
    support_ids: Tensor,
    target_ids: Tensor,
    transform: LogitTransform,
    vocabulary: Vocabulary,
) -> Columns:
    """The log-probs over ``support_ids`` ``[n, K]`` and each row's own token."""
    contained = (support_ids == target_ids[:, None]).any(1, keepdim=True)
    ids = torch.cat([support_ids, target_ids[:, None].masked_fill(contained, -1)], dim=1)
    local, here = _local(ids, vocabulary)
    logits = hidden.new_empty(ids.shape)
    for rows, columns in _gathered(head.weight, local, hidden.dtype):
        torch.bmm(columns, hidden[rows, :, None], out=logits[rows, :, None])
    if head.bias is not None:
        logits += head.bias[local]
    logits, slopes = _transformed(logits.clamp_min_(LOWEST), transform)
    logits.masked_fill_(~here, LOWEST)
    if vocabulary.group is not None:
        (shards,) = vocabulary.gather([logits])
        logits = shards.amax(0)
    log_probs = logits.log_softmax(1)
    own = log_probs.gather(1, (ids == target_ids[:, None]).int().argmax(1, keepdim=True)).squeeze(1)
    return Columns(
        hidden,
        ids,
        slopes,
        Statistics(own, torch.zeros_like(own)[:, None], support_ids=support_ids, support_log_probs=log_probs[:, :-1]),
    )


def accumulate(
    columns: Columns,
    gradients: RowGradients,
    target_ids: Tensor,
    head: Head,
    grad_head: HeadGradient,
    vocabulary: Vocabulary,
    *,
    grad_hidden: bool,
) -> Tensor:
    """Add to dW and db; dX rows ``[n, H]``, or the sums of dlogits ``[n, 1]`` where hidden states are frozen."""
    dlogits = coefficients(columns.statistics, gradients, RowSpec(), target_ids).at_ids * columns.slopes
    local, here = _local(columns.ids, vocabulary)
    dlogits = dlogits.masked_fill(~here, 0.0)
    grad_head.add_rows(local, dlogits, columns.hidden)
    if not grad_hidden:
        return dlogits.sum(1, keepdim=True)
    grad = torch.empty_like(columns.hidden)
    for rows, gathered in _gathered(head.weight, local, grad.dtype):
        torch.bmm(dlogits[rows, None], gathered, out=grad[rows, None])
    return grad


def _local(ids: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Ids relative to this shard, 0 for those of others, and which are here."""
    local = ids - vocabulary.first_id
    here = (ids >= 0) & (local >= 0) & (local < vocabulary.own_size)
    return local.masked_fill(~here, 0), here


def _gathered(weight: Tensor, ids: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The rows of the head at ``ids`` ``[n, K]`` of a few rows at a time, ``[m, K, H]``."""
    height = max(1, _ELEMENTS // (ids.shape[1] * weight.shape[1]))
    for start in range(0, len(ids), height):
        rows = slice(start, min(start + height, len(ids)))
        yield rows, weight[ids[rows]].to(dtype)


def _transformed(logits: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor]:
    """Logits in nats, and the transform's slope at each."""
    if transform.softcap is None:
        return logits * transform.scale, torch.full_like(logits, transform.scale)
    units = (logits * (transform.logit_scale / transform.softcap)).tanh_()
    return units * transform.nats_per_unit, (1.0 - units.square()) * transform.scale
