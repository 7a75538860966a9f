"""Rows of a vocabulary, whole or in shards: statistics from a backend's sums, gradients from coefficients."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from srpo_kernels.checks import refuse_name
from srpo_kernels.rows.contract import (
    LOWEST,
    Coefficients,
    Dlogits,
    ModelSums,
    RowGradients,
    Rows,
    RowSpec,
    Scratch,
    Statistics,
    Support,
)
from srpo_kernels.rows.sums import (
    given_statistics,
    merge,
    pack,
    pair_statistics,
    row_statistics,
    support_statistics,
    support_sums,
    unpack,
    with_divergence_sums,
)
from srpo_kernels.rows.vocabulary import Vocabulary

# That a gradient may be of any statistics: the logits stay as they are.
ANY = frozenset(RowGradients._fields)

# What is computed in rounds: it yields its part of what all shards exchange, is sent what they all have, and returns.
_Rounds = Generator[Tensor, Tensor, Statistics]


class Request(NamedTuple):
    """Rows whose statistics are wanted: both models' logits ``[n, V_r]``, and target ids of the whole vocabulary.

    ``entropy`` adds the student's; the teacher's is always there. ``gradient`` names the statistics whose gradients
    ``dlogits_`` may be given. ``support`` are tokens whose log-probs are wanted, the teacher's too if it knows them.
    """

    logits: Tensor
    teacher_logits: Tensor | None
    spec: RowSpec
    target_ids: Tensor
    entropy: bool = False
    gradient: frozenset[str] = ANY
    support: Support | None = None


class RowPasses:
    """A backend's passes over this process's logits ``[n, V_r]``: each statistic is the whole row's, on all ranks.

    ``target_ids`` and supports are ids of the whole vocabulary. A pass of statistics gathers its sums once, a
    divergence from a mixture a second time; a gradient's pass needs nobody.
    """

    def __init__(self, rows: Rows, vocabulary: Vocabulary) -> None:
        self.rows, self.vocabulary = rows, vocabulary

    def scratch(self, vocab_size: int, device: torch.device) -> Scratch:
        """What a pass allocates beside its arguments."""
        return self.rows.scratch(vocab_size, device)

    def statistics(self, *requests: Request) -> list[Statistics]:
        """Reduce the logits of each request; shards exchange what all of them need at once."""
        rounds = [self._rounds(request) for request in requests]
        results: list[Statistics | None] = [None] * len(requests)
        # Nothing is sent to what has not begun.
        sent: dict[int, Any] = dict.fromkeys(range(len(requests)))
        while sent:
            values = {}
            for i, received in sent.items():
                try:
                    values[i] = rounds[i].send(received)
                except StopIteration as done:
                    results[i] = done.value
            sent = dict(zip(values, self.vocabulary.gather(list(values.values())), strict=True))
        return [stats for stats in results if stats is not None]

    def _rounds(self, request: Request) -> _Rounds:
        z, y, spec, target_ids, entropy, gradient, support = request
        if support is not None:
            student = yield from self._at(z, spec, target_ids, support.ids, entropy=entropy)
            return (
                student
                if support.log_probs is None
                else student.with_teacher(given_statistics(support.log_probs, spec))
            )
        if self.vocabulary.group is None:
            whole = self.rows.whole_rows(z, y, spec, target_ids=target_ids, entropy=entropy, gradient=gradient)
            if whole is not None:
                return whole
        if y is None and spec.topk:
            return (yield from self._topk(z, spec, target_ids, entropy=entropy))
        if y is None:
            (sums,) = yield from self._sums(z, None, spec, target_ids)
            return row_statistics(sums, self.rows.slope(spec.transform), entropy=entropy)
        if spec.topk:
            match spec.topk_of:
                case "student":
                    student = yield from self._topk(z, spec, target_ids, entropy=entropy)
                    assert student.support_ids is not None
                    teacher = yield from self._at(y, spec, target_ids, student.support_ids, entropy=True)
                case "teacher":
                    teacher = yield from self._topk(y, spec, target_ids, entropy=True)
                    assert teacher.support_ids is not None
                    student = yield from self._at(z, spec, target_ids, teacher.support_ids, entropy=entropy)
                case unknown:
                    refuse_name("topk_of", unknown)
            return student.with_teacher(teacher)
        if not spec.compares and self.vocabulary.group is None:
            # Each model alone, where it is cheaper.
            student = yield from self._rounds(request._replace(teacher_logits=None))
            teacher = yield from self._rounds(Request(y, None, spec, target_ids, entropy=True, gradient=frozenset()))
            return student.with_teacher(teacher)
        student_sums, teacher_sums = yield from self._sums(z, y, spec, target_ids)
        stats = pair_statistics(student_sums, teacher_sums, spec, self.rows.slope(spec.transform), entropy=entropy)
        if spec.mixture is None and spec.entries is None:
            return stats
        own = self.rows.divergence_sums(z, y, stats, spec, first=self.vocabulary.first_id == 0)
        if self.vocabulary.group is not None:
            own = (yield own).sum(0)
        return with_divergence_sums(stats, own, spec)

    def _sums(
        self, logits: Tensor, teacher_logits: Tensor | None, spec: RowSpec, target_ids: Tensor
    ) -> Generator[Tensor, Tensor, list[ModelSums]]:
        """Those of whole rows."""
        targets = target_ids - self.vocabulary.first_id
        own = self.rows.sums(logits, teacher_logits, spec.transform, target_ids=targets)
        if self.vocabulary.group is None:
            return own
        return merge(unpack((yield pack(own))), self.rows.slope(spec.transform))

    def _topk(self, logits: Tensor, spec: RowSpec, target_ids: Tensor, *, entropy: bool) -> _Rounds:
        """A model's likeliest tokens, out of those of every shard that may belong to them."""
        own = logits.topk(min(spec.topk, logits.shape[1]), dim=1).indices
        if self.vocabulary.group is None:
            return (yield from self._at(logits, spec, target_ids, own, entropy=entropy))
        slope, targets = self.rows.slope(spec.transform), target_ids - self.vocabulary.first_id
        complement, units = self.rows.support_sums(logits, spec.transform, target_ids=targets, support_ids=own)
        missing = spec.topk - own.shape[1]
        # Ids travel as the bits of a number of the units' size.
        integers = torch.int32 if units.dtype == torch.float32 else torch.int64
        bits = pad(own + self.vocabulary.first_id, (0, missing)).to(integers).view(units.dtype)
        gathered = yield torch.cat([pack([complement]), pad(units, (0, missing), value=LOWEST), bits], dim=1)
        parts, candidates, bits = gathered.split([5, spec.topk, spec.topk], dim=2)
        candidates, bits = (x.movedim(0, 1).flatten(1) for x in (candidates, bits))
        chosen = candidates.topk(spec.topk, dim=1)
        # What was not chosen belongs to the rest of the row.
        rest = support_sums(candidates.scatter(1, chosen.indices, LOWEST), slope)
        rest = rest._replace(target=torch.full_like(rest.target, LOWEST))
        (complement,) = merge(unpack(torch.cat([parts, pack([rest])[None]])), slope)
        ids = bits.contiguous().view(integers).gather(1, chosen.indices).long()
        return support_statistics(complement, chosen.values, ids, spec, slope, entropy=entropy)

    def _at(self, logits: Tensor, spec: RowSpec, target_ids: Tensor, support_ids: Tensor, *, entropy: bool) -> _Rounds:
        """At a support that is given."""
        slope, first = self.rows.slope(spec.transform), self.vocabulary.first_id
        complement, units = self.rows.support_sums(
            logits, spec.transform, target_ids=target_ids - first, support_ids=support_ids - first
        )
        if self.vocabulary.group is not None:
            gathered = yield torch.cat([pack([complement]), units], dim=1)
            (complement,) = merge(unpack(gathered[..., :5]), slope)
            units = gathered[..., 5:].amax(0)
        return support_statistics(complement, units, support_ids, spec, slope, entropy=entropy)

    def dlogits_(self, request: Request, stats: Statistics, gradients: RowGradients, *, dtype: torch.dtype) -> Dlogits:
        """Turn what ``statistics`` left in both buffers into dlogits, all terms at once."""
        z, y, spec = request[:3]
        local = coefficients(stats, gradients, spec, request.target_ids)
        local = local._replace(ids=local.ids - self.vocabulary.first_id)
        return self.rows.dlogits_(z, y, stats, local, spec, dtype=dtype)


def coefficients(stats: Statistics, gradients: RowGradients, spec: RowSpec, target_ids: Tensor) -> Coefficients:
    """What the upstream gradients of a row's statistics are for its logits.

    With g at ids and ``total = sum(g)``, less the log-sum-exp's gradient, dz at an id is ``g_k - total p_k``, from the
    log-prob: exactly 0 for the one token of a row that has no other. Elsewhere it is ``-total p_v``, or with a tail
    ``(g_tail - total tail) p_v / tail``: ``p_v / tail`` is the softmax of the tail alone, and is there where ``p_v``
    has underflown.
    """
    log_sum, ids = stats.logsumexp, target_ids[:, None]
    log_probs, grads = stats.log_probs[:, None], gradients.log_probs
    if gradients.support_log_probs is not None:
        assert stats.support_ids is not None and stats.support_log_probs is not None
        support, grads = gradients.support_log_probs, None if grads is None else grads[:, None]
        if grads is None:
            ids, log_probs, grads = stats.support_ids, stats.support_log_probs, support
        else:
            # A target that is in the support as well is one token: its gradients add up there.
            same = stats.support_ids == ids
            alone = ~same.any(1, keepdim=True)
            ids = torch.cat([stats.support_ids, ids.masked_fill(~alone, -1)], dim=1)
            log_probs = torch.cat([stats.support_log_probs, log_probs], dim=1)
            grads = torch.cat([support + same * grads, alone * grads], dim=1)
    elif grads is None:
        ids, log_probs, grads = ids[:, :0], log_probs[:, :0], log_probs[:, :0]
    else:
        grads = grads[:, None]
    total = grads.sum(1)
    if gradients.logsumexp is not None:
        # p_v is the log-sum-exp's gradient, and what a log-prob's takes away everywhere.
        total = total - gradients.logsumexp
    outside = -total
    if gradients.log_tail is not None:
        if gradients.entropy is not None:
            raise NotImplementedError("an entropy's gradient needs the softmax of the row, a tail's that of the tail")
        assert stats.tail_logsumexp is not None and stats.log_tail is not None
        log_sum = stats.tail_logsumexp
        total = total + gradients.log_tail
        outside = gradients.log_tail - total * stats.log_tail.exp()
    kls = {"forward_kl": gradients.forward_kl, "reverse_kl": gradients.reverse_kl}
    by_divergence = gradients.divergence
    if by_divergence is not None and spec.kl is not None:
        beside = kls[spec.kl]
        kls[spec.kl] = by_divergence if beside is None else beside + by_divergence
        by_divergence = None
    elif by_divergence is not None and spec.mixture is not None:
        by_divergence = by_divergence * spec.mixture.slope
    return Coefficients(
        ids,
        grads - total[:, None] * log_probs.exp(),
        outside,
        log_sum,
        None if gradients.entropy is None else -gradients.entropy,
        kls["forward_kl"],
        kls["reverse_kl"],
        by_divergence,
    )
