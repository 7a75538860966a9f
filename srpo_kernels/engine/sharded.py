"""Row passes over a vocabulary whose logits lie in several processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from srpo_kernels.engine import backends
from srpo_kernels.engine.vocabulary import Vocabulary
from srpo_kernels.rows.contract import (
    LOWEST,
    DivergenceStats,
    Dlogits,
    RowGradients,
    RowPasses,
    RowSpec,
    RowStats,
    Scratch,
)
from srpo_kernels.rows.sums import ModelSums, SlicePasses, finish_divergence, finish_row, finish_support, merge


class ShardedPasses:
    """``RowPasses`` on this rank's logits ``[n, V_r]``: each statistic is the whole row's, the same on all ranks.

    The statistics' passes leave the logits as they are, with the whole vocabulary in one process as well.

    ``target_ids`` and supports are ids of the whole vocabulary. A pass of statistics gathers its sums once, jsd a
    second time, and takes along what waits; a gradient's pass needs nobody.
    """

    def __init__(self, slices: SlicePasses, vocabulary: Vocabulary) -> None:
        self.slices, self.vocabulary = slices, vocabulary

    def scratch(self, vocab_size: int, device: torch.device) -> Scratch:
        """What a pass allocates beside its arguments."""
        return self.slices.scratch(vocab_size, device)

    def row_stats(
        self,
        logits: Tensor,
        spec: RowSpec,
        *,
        target_ids: Tensor,
        support_ids: Tensor | None = None,
        entropy: bool = False,
    ) -> RowStats:
        """One exchange: of sums, and where there is a support of its logits, or of those that may belong to it."""
        slope, targets = self.slices.slope(spec), target_ids - self.vocabulary.first_id
        if support_ids is None and not spec.topk:
            sums = self.vocabulary.combine(self.slices.model_sums(logits, None, spec, target_ids=targets), slope)
            return finish_row(sums[0], slope, entropy=entropy)
        if support_ids is None:
            own = logits.topk(min(spec.topk, logits.shape[1]), dim=1).indices
            complement, units = self.slices.support_sums(logits, spec, target_ids=targets, support_ids=own)
            complement, units, support_ids = self._choose(complement, units, own, spec.topk, slope)
        else:
            own = support_ids - self.vocabulary.first_id
            complement, units = self.slices.support_sums(logits, spec, target_ids=targets, support_ids=own)
            gathered = self.vocabulary.gather(torch.cat([ModelSums.pack([complement]), units], dim=1))
            complement = _merge(gathered[..., :5], slope)
            units = gathered[..., 5:].amax(0)
        return finish_support(complement, units, support_ids, spec, slope, entropy=entropy)

    def row_stats_later(
        self, logits: Tensor, spec: RowSpec, *, target_ids: Tensor, entropy: bool
    ) -> Callable[[], RowStats]:
        """No exchange: the sums wait for the next pass's."""
        slope, targets = self.slices.slope(spec), target_ids - self.vocabulary.first_id
        (sums,) = self.slices.model_sums(logits, None, spec, target_ids=targets)
        gathered = self.vocabulary.gather_later(ModelSums.pack([sums]))
        return lambda: finish_row(_merge(gathered(), slope), slope, entropy=entropy)

    def _choose(
        self, complement: ModelSums, units: Tensor, ids: Tensor, topk: int, slope: float
    ) -> tuple[ModelSums, Tensor, Tensor]:
        """The top-k of the whole row out of every shard's own, and the sums of all but those."""
        missing = topk - ids.shape[1]
        # Ids travel as the bits of a number of the units' size.
        integers = torch.int32 if units.dtype == torch.float32 else torch.int64
        bits = pad(ids + self.vocabulary.first_id, (0, missing)).to(integers).view(units.dtype)
        own = [ModelSums.pack([complement]), pad(units, (0, missing), value=LOWEST), bits]
        sums, candidates, bits = self.vocabulary.gather(torch.cat(own, dim=1)).split([5, topk, topk], dim=2)
        candidates, bits = (x.movedim(0, 1).flatten(1) for x in (candidates, bits))
        chosen = candidates.topk(topk, dim=1)
        rest = ModelSums.of_support(candidates.scatter(1, chosen.indices, LOWEST), slope)
        rest = rest._replace(target=torch.full_like(rest.target, LOWEST))
        complement = _merge(torch.cat([sums, ModelSums.pack([rest])[None]]), slope)
        return complement, chosen.values, bits.contiguous().view(integers).gather(1, chosen.indices).long()

    def divergence_stats(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        spec: RowSpec,
        *,
        target_ids: Tensor,
        gradient: bool,
        entropy: bool = False,
    ) -> DivergenceStats:
        """One exchange of both models' sums; for jsd a second one, of its own."""
        slope, targets = self.slices.slope(spec), target_ids - self.vocabulary.first_id
        parts = self.slices.model_sums(student_logits, teacher_logits, spec, target_ids=targets)
        student, teacher = self.vocabulary.combine(parts, slope)
        stats = finish_divergence(student, teacher, spec, slope, entropy=entropy)
        if spec.divergence != "jsd":
            return stats
        log_sums = stats.logsumexp, stats.teacher_logsumexp
        sums = self.vocabulary.gather(self.slices.jsd_sums(student_logits, teacher_logits, *log_sums, spec)).sum(0)
        return stats.with_jsd(*self.slices.finish_jsd(sums, *log_sums, spec), spec)

    def log_prob_gradient_(
        self,
        logits: Tensor,
        stats: RowStats,
        spec: RowSpec,
        *,
        ids: Tensor,
        log_probs: Tensor,
        grad_log_probs: Tensor,
        grad_tail: Tensor | None = None,
        grad_entropy: Tensor | None = None,
        dtype: torch.dtype,
    ) -> Dlogits:
        """Of this shard's logits."""
        return self.slices.log_prob_gradient_(
            logits,
            stats,
            spec,
            ids=ids - self.vocabulary.first_id,
            log_probs=log_probs,
            grad_log_probs=grad_log_probs,
            grad_tail=grad_tail,
            grad_entropy=grad_entropy,
            dtype=dtype,
        )

    def divergence_gradient_(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        stats: DivergenceStats,
        spec: RowSpec,
        *,
        grad_divergence: Tensor,
        dtype: torch.dtype,
    ) -> Dlogits:
        """Of this shard's logits."""
        nothing = torch.zeros_like(grad_divergence)
        ids = torch.full_like(grad_divergence, -1, dtype=torch.int64)
        grads = RowGradients(nothing, nothing, grad_divergence)
        stats = stats._replace(entropy=None)
        return Dlogits(
            self.gradient_(student_logits, teacher_logits, stats, grads, spec, target_ids=ids, dtype=dtype), None
        )

    def gradient_(
        self,
        logits: Tensor,
        teacher_logits: Tensor | None,
        stats: RowStats | DivergenceStats,
        grads: RowGradients,
        spec: RowSpec,
        *,
        target_ids: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """Turn this shard's logits, which the statistics' passes have left, into dlogits: all terms at once."""
        target_ids = target_ids - self.vocabulary.first_id
        return self.slices.gradient_(logits, teacher_logits, stats, grads, spec, target_ids=target_ids, dtype=dtype)


def row_passes(backend: str, vocabulary: Vocabulary) -> RowPasses:
    """The passes of a backend over the rows of a vocabulary, of which this process may have a shard."""
    if vocabulary.group is None:
        return backends.row_passes(backend)
    return ShardedPasses(backends.slice_passes(backend), vocabulary)


def row_stats_later(
    passes: RowPasses, logits: Tensor, spec: RowSpec, *, target_ids: Tensor, entropy: bool = False
) -> Callable[[], RowStats]:
    """``passes.row_stats`` without a support, for after the next pass of statistics: shards exchange both at once."""
    if isinstance(passes, ShardedPasses):
        return passes.row_stats_later(logits, spec, target_ids=target_ids, entropy=entropy)
    return partial(passes.row_stats, logits, spec, target_ids=target_ids, entropy=entropy)


def _merge(sums: Tensor, slope: float) -> ModelSums:
    """The sums of whole rows from those of their parts, ``[parts, n, 5]``."""
    return merge(ModelSums.unpack(sums), slope)[0]
