"""Rows of a vocabulary, whole or in shards: statistics from a backend's sums, gradients from coefficients."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from srpo_kernels.checks import refuse_name
from srpo_kernels.rows.coefficients import coefficients
from srpo_kernels.rows.contract import (
    Dlogits,
    ModelSums,
    RowGradients,
    Rows,
    Scratch,
    Statistics,
    Support,
)
from srpo_kernels.rows.spec import LOWEST, RowSpec
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

# Elements of rows that are copied at a time: 128 MiB in fp32.
_COPIED_ELEMENTS = 1 << 25

# What is computed in rounds: it yields its part of what all shards exchange, is sent what they all have, and returns.
_Rounds = Generator[Tensor, Tensor, Statistics]


class Request(NamedTuple):
    """Rows whose statistics are wanted: both models' logits ``[n, V_r]``, and target ids of the whole vocabulary.

    ``entropy`` adds the student's; the teacher's is always there. ``gradient`` names the statistics whose gradients
    ``dlogits_`` may be given. ``support`` are a teacher's tokens in the place of its logits; ``sampled_ids`` ``[n, S]``
    are more tokens whose log-probs are wanted.
    """

    logits: Tensor
    teacher_logits: Tensor | None
    spec: RowSpec
    target_ids: Tensor
    entropy: bool = False
    gradient: frozenset[str] = ANY
    support: Support | None = None
    sampled_ids: Tensor | None = None


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
        # Units are read first: a pass over whole rows writes over the logits.
        results = self._exchange([f(request) for f in (self._sampled_units, self._rounds) for request in requests])
        units, stats = results[: len(requests)], results[len(requests) :]
        return [self._with_sampled(*x) for x in zip(requests, stats, units, strict=True)]

    def _exchange(self, rounds: list[Generator[Tensor, Tensor, Any]]) -> list[Any]:
        """Run all to their ends, side by side."""
        results: list[Any] = [None] * len(rounds)
        # Nothing is sent to what has not begun.
        sent: dict[int, Any] = dict.fromkeys(range(len(rounds)))
        while sent:
            values = {}
            for i, received in sent.items():
                try:
                    values[i] = rounds[i].send(received)
                except StopIteration as done:
                    results[i] = done.value
            sent = dict(zip(values, self.vocabulary.gather(list(values.values())), strict=True))
        return results

    def _sampled_units(self, request: Request) -> Generator[Tensor, Tensor, Tensor | None]:
        """Units of ``sampled_ids`` and, behind them, of the row's own token; LOWEST for none."""
        if request.sampled_ids is None:
            return None
        logits, sampled = request.logits, torch.cat([request.sampled_ids, request.target_ids[:, None]], dim=1)
        ids = self._local(sampled)
        here = (sampled >= 0) & (ids >= 0) & (ids < logits.shape[1])
        units = self.rows.units(logits.gather(1, ids.masked_fill(~here, 0)), request.spec.transform)
        units = units.masked_fill(~here, LOWEST)
        return units if self.vocabulary.group is None else (yield units).amax(0)

    def _with_sampled(self, request: Request, stats: Statistics, units: Tensor | None) -> Statistics:
        if units is None:
            return stats
        log_probs = self.rows.slope(request.spec.transform) * units.to(stats.logsumexp) - stats.logsumexp
        log_probs = log_probs.to(stats.log_probs).clamp(LOWEST, 0.0)
        # Under a large softcap a log-prob is rounded by more than two tokens differ in: all of them in one way.
        return stats._replace(
            log_probs=log_probs[:, -1], sampled_ids=request.sampled_ids, sampled_log_probs=log_probs[:, :-1]
        )

    def _rounds(self, request: Request) -> _Rounds:
        z, y, spec, target_ids, entropy, gradient, support, _ = request
        if support is not None:
            student = yield from self._at(z, spec, target_ids, support.ids, entropy=entropy)
            return student.with_teacher(given_statistics(support.log_probs, spec))
        if self.vocabulary.group is None:
            whole = self.rows.whole_rows(z, y, spec, target_ids=target_ids, entropy=entropy, gradient=gradient)
            if whole is not None:
                return whole
        if y is None and spec.topk:
            return (yield from self._topk(z, spec, target_ids, entropy=entropy))
        if y is None:
            (sums,) = yield from self._sums(z, None, spec, target_ids)
            return row_statistics(sums, self.rows.slope(spec.transform), entropy=entropy)
        teacher_spec = replace(spec, transform=spec.teacher_transform)
        if spec.topk:
            match spec.topk_of:
                case "student":
                    student = yield from self._topk(z, spec, target_ids, entropy=entropy)
                    assert student.support_ids is not None
                    teacher = yield from self._at(y, teacher_spec, target_ids, student.support_ids, entropy=True)
                case "teacher":
                    teacher = yield from self._topk(y, teacher_spec, target_ids, entropy=True)
                    assert teacher.support_ids is not None
                    student = yield from self._at(z, spec, target_ids, teacher.support_ids, entropy=entropy)
                case unknown:
                    refuse_name("topk_of", unknown)
            return student.with_teacher(teacher)
        if not spec.compares and self.vocabulary.group is None:
            # Each model alone, where it is cheaper.
            student = yield from self._rounds(request._replace(teacher_logits=None))
            teacher = yield from self._rounds(Request(y, None, teacher_spec, target_ids, True, frozenset()))
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
        own = self.rows.sums(
            logits,
            teacher_logits,
            spec.transform,
            target_ids=self._local(target_ids),
            teacher_transform=spec.teacher_transform,
        )
        if self.vocabulary.group is None:
            return own
        return merge(unpack((yield pack(own))), self.rows.slope(spec.transform))

    def _topk(self, logits: Tensor, spec: RowSpec, target_ids: Tensor, *, entropy: bool) -> _Rounds:
        """A model's likeliest tokens, out of those of every shard that may belong to them."""
        own = _likeliest(logits, min(spec.topk, logits.shape[1]))
        if self.vocabulary.group is None:
            return (yield from self._at(logits, spec, target_ids, own, entropy=entropy))
        slope, targets = self.rows.slope(spec.transform), self._local(target_ids)
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
        slope, (targets, local) = self.rows.slope(spec.transform), map(self._local, (target_ids, support_ids))
        complement, units = self.rows.support_sums(logits, spec.transform, target_ids=targets, support_ids=local)
        if self.vocabulary.group is not None:
            gathered = yield torch.cat([pack([complement]), units], dim=1)
            (complement,) = merge(unpack(gathered[..., :5]), slope)
            units = gathered[..., 5:].amax(0)
        return support_statistics(complement, units, support_ids, spec, slope, entropy=entropy)

    def _local(self, ids: Tensor) -> Tensor:
        """Relative to this process's first id."""
        return ids - self.vocabulary.first_id if self.vocabulary.first_id else ids

    def dlogits_(self, request: Request, stats: Statistics, gradients: RowGradients, *, out: Tensor) -> Dlogits:
        """Turn what ``statistics`` left in both buffers into dlogits in ``out``, all terms at once."""
        z, y, spec = request[:3]
        local = coefficients(stats, gradients, spec, request.target_ids)
        local = local._replace(ids=self._local(local.ids))
        if local.by_log is not None and gradients.log_tail is not None:
            # What is beside the logarithm of a softmax that is the tail's.
            assert stats.entropy is not None and stats.log_tail is not None
            stats = stats._replace(entropy=stats.entropy + stats.log_tail)
        return self.rows.dlogits_(z, y, stats, local, spec, out=out)


def _likeliest(logits: Tensor, k: int) -> Tensor:
    """The ids of the largest ``k`` of each row. CUDA copies rows that have something between them: a few at a time."""
    height = len(logits) if logits.is_contiguous() else max(1, _COPIED_ELEMENTS // logits.shape[1])
    return torch.cat([part.topk(k, dim=1).indices for part in logits.split(max(height, 1))])
