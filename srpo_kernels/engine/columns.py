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
from srpo_kernels.rows.contract import RowGradients, Statistics, Support
from srpo_kernels.rows.dtypes import wide_dtype
from srpo_kernels.rows.spec import LOWEST, LogitTransform, RowSpec
from srpo_kernels.rows.sums import given_statistics
from srpo_kernels.rows.vocabulary import Vocabulary

# Where the head has fewer rows for each token of a support, a whole row of logits is cheaper: the gathered columns of a
# row serve that row alone.
_ROWS_PER_TOKEN = 32
# Elements of the gathered columns of a few rows: 64 MiB in fp32.
_ELEMENTS = 1 << 24


def cheaper(tokens: int, vocab_size: int) -> bool:
    """Whether rows of ``tokens`` tokens cost less by their columns."""
    return (tokens + 1) * _ROWS_PER_TOKEN <= vocab_size


class NotByColumns(Exception):
    """An objective has turned out to read what a few columns of the head do not say."""


class Columns(NamedTuple):
    """n rows by their K tokens: hidden states ``[n, H]`` in the accumulation dtype, ids of the whole vocabulary.

    A negative id is none. The tokens are those that models are compared at, those that a row was sampled from, and the
    row's own where it is none of these. ``log_probs`` are over all of them, one that is there twice counting twice:
    nothing that is read of them depends on what they are relative to. ``slopes`` are the logit transform's; all of
    these are ``[n, K]``, and ``own`` ``[n, 1]`` says where the row's own token is.
    """

    hidden: Tensor
    ids: Tensor
    log_probs: Tensor
    slopes: Tensor
    own: Tensor
    statistics: Statistics


def compute(
    hidden: Tensor,
    head: Head,
    given: Support | None,
    sampled_ids: Tensor,
    target_ids: Tensor,
    spec: RowSpec,
    vocabulary: Vocabulary,
    *,
    compares: bool,
) -> Columns:
    """The log-probs at ``sampled_ids`` ``[n, S]`` and each row's own token.

    ``given`` is what is known of a teacher; where it ``compares``, log-probs at its tokens too.
    """
    targets, compared_ids = target_ids[:, None], given.ids if given is not None and compares else None
    contained = (sampled_ids == targets).any(1, keepdim=True)
    lists = [*([] if compared_ids is None else [compared_ids]), sampled_ids, targets.masked_fill(contained, -1)]
    ids = torch.cat(lists, dim=1)
    local, here = _local(ids, vocabulary)
    logits = hidden.new_empty(ids.shape)
    for rows, columns in _gathered(head.weight, local, hidden.dtype):
        torch.bmm(columns, hidden[rows, :, None], out=logits[rows, :, None])
    if head.bias is not None:
        logits += head.bias[local]
    logits, slopes = _transformed(logits.clamp_min_(LOWEST), spec.transform)
    logits.masked_fill_(~here, LOWEST)
    if vocabulary.group is not None:
        (shards,) = vocabulary.gather([logits])
        logits = shards.amax(0)
    log_probs = logits.log_softmax(1)
    own = (ids == targets).int().argmax(1, keepdim=True)
    compared = 0 if compared_ids is None else compared_ids.shape[1]
    statistics = Statistics(
        log_probs.gather(1, own).squeeze(1),
        logits.to(wide_dtype(logits.device)).logsumexp(1, keepdim=True),
        support_ids=compared_ids,
        support_log_probs=None if compared_ids is None else log_probs[:, :compared],
        sampled_ids=sampled_ids,
        sampled_log_probs=log_probs[:, compared:-1],
    )
    if given is not None:
        statistics = statistics.with_teacher(given_statistics(given.log_probs, spec))
    return Columns(hidden, ids, log_probs, slopes, own, statistics)


def accumulate(
    columns: Columns,
    gradients: RowGradients,
    head: Head,
    grad_head: HeadGradient,
    vocabulary: Vocabulary,
    *,
    grad_hidden: bool,
) -> Tensor:
    """Add to dW and db; dX rows ``[n, H]``, or the sums of dlogits ``[n, 1]`` where hidden states are frozen."""
    dlogits = _dlogits(columns, gradients)
    local, here = _local(columns.ids, vocabulary)
    dlogits = dlogits.masked_fill(~here, 0.0)
    grad_head.add_rows(local, dlogits, columns.hidden)
    if not grad_hidden:
        return dlogits.sum(1, keepdim=True)
    grad = torch.empty_like(columns.hidden)
    for rows, gathered in _gathered(head.weight, local, grad.dtype):
        torch.bmm(dlogits[rows, None], gathered, out=grad[rows, None])
    return grad


def _dlogits(columns: Columns, gradients: RowGradients) -> Tensor:
    """``slope_k (g_k - total p_k)``, where total is the sum of all g, less the log-sum-exp's."""
    grads, compared = torch.zeros_like(columns.log_probs), columns.statistics.support_ids
    first = 0 if compared is None else compared.shape[1]
    # Rows that are evaluated with these may have been compared, by their logits.
    if compared is not None and gradients.support_log_probs is not None:
        grads[:, :first] += gradients.support_log_probs
    if gradients.sampled_log_probs is not None:
        grads[:, first:-1] += gradients.sampled_log_probs
    if gradients.log_probs is not None:
        grads.scatter_add_(1, columns.own, gradients.log_probs[:, None])
    total = grads.sum(1, keepdim=True)
    if gradients.logsumexp is not None:
        total = total - gradients.logsumexp[:, None]
    return columns.slopes * (grads - total * columns.log_probs.exp())


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
