"""The fused path: loss and gradients in one forward, chunk by chunk of rows.

Per chunk: logits by one product, the row pass, the objective on vectors (its autograd gives the coefficients), dlogits
in the same buffer, then dX and dW by one product each. Distillation rows come first: their entropy weights are divided
by their mean once it is known, before any policy row is added. The last of them share their products, and between
shards of the vocabulary an exchange, with the first policy rows where the workspace holds both: few large ones are
faster than many small ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from srpo_kernels.engine import gemm
from srpo_kernels.engine.batch import Batch, FusedResult, Head, Needs
from srpo_kernels.engine.distillation import distill_chunk
from srpo_kernels.engine.plan import Plan
from srpo_kernels.engine.sharded import row_stats_later
from srpo_kernels.engine.vocabulary import Vocabulary
from srpo_kernels.losses import objective
from srpo_kernels.losses.config import SRPOConfig
from srpo_kernels.losses.objective import METRICS
from srpo_kernels.rows.contract import Dlogits, RowPasses, RowSpec, RowStats
from srpo_kernels.rows.dtypes import accumulation_dtype


class _Chunk(NamedTuple):
    """Rows whose products are taken together: their hidden states as an operand, and their logits in the buffer."""

    rows: Tensor
    hidden: Tensor
    logits: Tensor

    def split(self, length: int) -> tuple[_Chunk, _Chunk]:
        """The first rows and the others."""
        return _Chunk(*(x[:length] for x in self)), _Chunk(*(x[length:] for x in self))


class _Carried(NamedTuple):
    """A chunk of which the distillation rows are done and the ``policy`` rows are not; ``stats`` has theirs.

    ``dlogits`` are the distillation rows', None where they are accumulated already or no gradient is wanted;
    ``rescale`` brings what was accumulated before to scale.
    """

    chunk: _Chunk
    policy: _Chunk
    stats: Callable[[], RowStats]
    dlogits: Dlogits | None
    rescale: Tensor | None


class FusedPass:
    """One run of the loss over a batch, after a plan."""

    def __init__(
        self,
        batch: Batch,
        plan: Plan,
        config: SRPOConfig,
        needs: Needs,
        passes: RowPasses,
        vocabulary: Vocabulary,
        buffer: Tensor,
    ) -> None:
        self.batch, self.plan, self.config, self.needs, self.passes = batch, plan, config, needs, passes
        self.vocabulary, self.buffer = vocabulary, buffer
        self.dtype = accumulation_dtype(batch.hidden, batch.head.weight)
        self.operand_dtype = gemm.operand_dtype(batch.head.weight, self.dtype)
        topk = min(config.topk, vocabulary.size) if config.distillation_mode == "topk" else 0
        self.policy_spec = RowSpec(
            temperature=config.temperature, logit_scale=config.logit_scale, softcap=config.softcap
        )
        self.distillation_spec = replace(
            self.policy_spec,
            divergence=config.divergence if config.distillation_mode == "full" else None,
            alpha=config.alpha,
            topk=topk,
            add_tail=config.add_tail and 0 < topk < vocabulary.size,
        )
        self.log_probs = batch.hidden.new_zeros(len(batch.target_ids), dtype=self.dtype)
        # Where hidden states are frozen, the sums of dlogits: they are finite where all dlogits of a row are.
        probe = batch.hidden if needs.hidden else batch.hidden[:, :1]
        self.grad_rows = torch.zeros_like(probe, dtype=self.dtype) if any(needs) else None
        self.grad_head = gemm.HeadGradient(
            batch.head.weight if needs.weight else None, batch.head.bias if needs.bias else None, self.dtype
        )
        self.finite = torch.ones_like(self.log_probs, dtype=torch.bool)
        self.metrics = dict.fromkeys(METRICS, self.log_probs.new_zeros(()))

    def run(self) -> FusedResult:
        """Distillation rows, then policy rows, then rows that only metrics want."""
        loss, carried = self.log_probs.new_zeros(()), None
        if self.plan.distillation_chunks:
            distilled, carried = self._distill()
            loss = loss + distilled
        if self.plan.policy_segments or self.plan.inactive_chunks or self.batch.inputs.group is not None:
            loss = loss + self._policy(carried)
        self.grad_head.finish()
        order = self.plan.order
        if self.grad_rows is not None:
            self.vocabulary.add_up_(self.grad_rows, torch.cat([order.distillation, order.policy]))
            self.finite &= self.grad_rows.isfinite().all(1)
        self._count("nonfinite_rows", ~self.finite)
        self._count("sdpo_tokens", len(order.distillation))
        self._count("policy_tokens", len(order.policy) + len(order.inactive))
        self._count("active_rows", len(order.distillation) + len(order.policy))
        grad_hidden = self.grad_rows if self.needs.hidden else None
        grad_head = self.grad_head
        return FusedResult(loss, self.log_probs, self.metrics, grad_hidden, grad_head.weight, grad_head.bias)

    def _distill(self) -> tuple[Tensor, _Carried | None]:
        order, beta = self.plan.order.distillation, self.config.dw_beta
        log_mean = self.batch.log_mean
        if self.plan.teacher_first:
            log_mean = objective.log_mean_exp(-beta * self._teacher_entropies())
        # The gradient is linear in 1 / mean(weights). Until the last chunk has shown that mean, weights are relative
        # to the middle of the range they can have; that chunk's products bring the others' gradients to scale.
        reference = (
            self.log_probs.new_tensor(-0.5 * beta * math.log(self.vocabulary.size)) if log_mean is None else log_mean
        )
        parts: list[tuple[Tensor, ...]] = []
        carried = None
        for ids in self.plan.distillation_chunks:
            rows = order[ids]
            shared = self.plan.shared_policy_rows if ids.stop == len(order) else 0
            chunk = self._logits(torch.cat([rows, self.plan.order.policy[:shared]]))
            own, policy = chunk.split(len(rows))
            if shared:
                policy_stats = self._policy_stats_later(policy)
            distilled = distill_chunk(
                self.passes,
                own.logits,
                self._teacher_logits(rows, offset=len(chunk.rows)),
                self.batch.target_ids[rows],
                self.distillation_spec,
                self.config,
                gradient=any(self.needs),
                dtype=self.operand_dtype,
            )
            parts.append((distilled.log_probs, distilled.teacher_entropy, distilled.divergence, distilled.loss))
            rescale = dlogits = None
            if log_mean is None and ids.stop == len(order):
                log_mean = objective.log_mean_exp(-beta * torch.cat([part[1] for part in parts]))
                rescale, reference = torch.exp(reference - log_mean), log_mean
            if any(self.needs):
                weights = torch.exp(-beta * distilled.teacher_entropy - reference)
                upstream = self.batch.factors[rows] * weights * self._correction(distilled.log_probs, rows)
                dlogits = distilled.gradient_(upstream)
                if rescale is not None and self.grad_rows is not None:
                    self.grad_rows[order[: ids.start]] *= rescale
                # Dlogits that are not where their logits were are no matrix with others'.
                if not shared or self.operand_dtype != self.dtype:
                    self._accumulate(dlogits, own, rescale)
                    dlogits = None
            if shared:
                carried = _Carried(chunk, policy, policy_stats, dlogits, rescale)

        log_probs, teacher_entropy, divergence, token_loss = map(torch.cat, zip(*parts, strict=True))
        self.log_probs[order] = log_probs
        weights = torch.exp(-beta * teacher_entropy - reference)
        weighted = weights * self._correction(log_probs, order) * token_loss
        self._count("sdpo_loss_sum", weighted)
        self._count("teacher_entropy_sum", teacher_entropy)
        self._count("dw_weight_sum", weights)
        self._count("dw_weight_sq_sum", weights.square())
        self._count("divergence_sum", divergence)
        self.finite[order] = weighted.isfinite()
        return (self.batch.factors[order] * weighted).sum(), carried

    def _policy(self, carried: _Carried | None) -> Tensor:
        order = self.plan.order
        stats: list[RowStats] = []
        # A rank without a policy row takes part where sequences have others elsewhere.
        for segment in self.plan.policy_segments or [[]]:
            segment_stats = []
            for ids in segment:
                chunk = self._logits(order.policy[ids]) if carried is None else carried.policy
                chunk_stats = self._policy_stats(chunk) if carried is None else carried.stats()
                segment_stats.append(chunk_stats)
            stats += segment_stats
            if not any(self.needs):
                carried = None
                continue
            rows = torch.cat([order.policy[:0], *(order.policy[ids] for ids in segment)])
            grad_log_probs, grad_entropy = self._policy_gradients(segment_stats, rows)
            # The last chunk's logits are still in the buffer; those of the earlier ones are computed again.
            for ids in reversed(segment):
                if ids is not segment[-1]:
                    chunk = self._logits(order.policy[ids])
                    chunk_stats = self._policy_stats(chunk)
                local = slice(ids.start - segment[0].start, ids.stop - segment[0].start)
                dlogits = self.passes.log_prob_gradient_(
                    chunk.logits,
                    chunk_stats,
                    self.policy_spec,
                    ids=self.batch.target_ids[chunk.rows, None],
                    log_probs=chunk_stats.log_probs[:, None],
                    grad_log_probs=grad_log_probs[local, None],
                    grad_entropy=None if grad_entropy is None else grad_entropy[local],
                    dtype=self.operand_dtype,
                )
                if carried is None or carried.dlogits is None:
                    self._accumulate(dlogits, chunk)
                else:
                    both = _join(carried.chunk.logits, [carried.dlogits, dlogits])
                    self._accumulate(both, carried.chunk, carried.rescale)
                carried = None
        stats += [self._policy_stats(self._logits(order.inactive[ids])) for ids in self.plan.inactive_chunks]

        active = len(order.policy)
        rows = torch.cat([order.policy, order.inactive]) if self.plan.inactive_chunks else order.policy
        log_probs, entropy = self._concatenate(stats)
        self.log_probs[rows] = log_probs
        inputs = self.batch.inputs.select(rows)
        terms = objective.policy_terms(log_probs, entropy, inputs, self.config)
        token_loss = terms.loss[:active]
        self._count("policy_loss_sum", token_loss)
        self._count("scored_policy_tokens", len(rows))
        self._count("clip_low_count", terms.clip_low)
        self._count("clip_high_count", terms.clip_high)
        self._count("dual_clip_count", terms.dual_clip)
        self._count("approx_kl_sum", terms.approx_kl)
        self._count("ref_kl_sum", terms.ref_kl)
        self.finite[order.policy] = token_loss.isfinite()
        if entropy is not None:
            self._count("entropy_sum", entropy)
            self._count("entropy_tokens", len(entropy))
        return (self.batch.factors[rows[:active]] * token_loss).sum()

    def _policy_stats(self, chunk: _Chunk) -> RowStats:
        entropy, target_ids = self.config.entropy_coef != 0.0, self.batch.target_ids[chunk.rows]
        return self.passes.row_stats(chunk.logits, self.policy_spec, target_ids=target_ids, entropy=entropy)

    def _policy_stats_later(self, chunk: _Chunk) -> Callable[[], RowStats]:
        """In the exchange of the distillation rows beside them."""
        entropy, target_ids = self.config.entropy_coef != 0.0, self.batch.target_ids[chunk.rows]
        return row_stats_later(self.passes, chunk.logits, self.policy_spec, target_ids=target_ids, entropy=entropy)

    def _policy_gradients(self, stats: list[RowStats], rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of the rows' share of the loss with respect to their log-probs and entropies."""
        log_probs, entropy = self._concatenate(stats)
        variables = [log_probs.requires_grad_()]
        if entropy is not None:
            variables.append(entropy.requires_grad_())
        with torch.enable_grad():
            loss = objective.policy_terms(log_probs, entropy, self.batch.inputs.select(rows), self.config).loss
            grad_log_probs, *grad_entropy = torch.autograd.grad(loss, variables, self.batch.factors[rows])
        return grad_log_probs, grad_entropy[0] if grad_entropy else None

    def _concatenate(self, stats: list[RowStats]) -> tuple[Tensor, Tensor | None]:
        """The log-probs and, where they were computed, the entropies of consecutive chunks: none, maybe."""
        entropies = [s.entropy for s in stats if s.entropy is not None]
        log_probs = torch.cat([self.log_probs[:0], *(s.log_probs for s in stats)])
        return log_probs, torch.cat(entropies) if entropies else None

    def _teacher_entropies(self) -> Tensor:
        entropies = []
        for chunk in self.plan.distillation_chunks:
            rows = self.plan.order.distillation[chunk]
            stats = self.passes.row_stats(
                self._teacher_logits(rows, offset=0),
                self.policy_spec,
                target_ids=self.batch.target_ids[rows],
                entropy=True,
            )
            assert stats.entropy is not None
            entropies.append(stats.entropy)
        return torch.cat(entropies)

    def _logits(self, rows: Tensor) -> _Chunk:
        """The student's, at the front of the buffer."""
        return self._project(self.batch.hidden, rows, rows, self.batch.head, 0)

    def _teacher_logits(self, rows: Tensor, offset: int) -> Tensor:
        batch = self.batch
        assert batch.teacher_hidden is not None
        return self._project(batch.teacher_hidden, batch.teacher_rows[rows], rows, batch.teacher_head, offset).logits

    def _project(self, hidden: Tensor, states: Tensor, rows: Tensor, head: Head, offset: int) -> _Chunk:
        logits = self.buffer[offset : offset + len(rows)]
        operand = hidden[states].to(gemm.operand_dtype(head.weight, self.dtype))
        gemm.project(operand, head.weight, head.bias, out=logits)
        return _Chunk(rows, operand, logits)

    def _accumulate(self, dlogits: Dlogits, chunk: _Chunk, rescale: Tensor | None = None) -> None:
        """Add a chunk's dX rows and its part of dW and db."""
        values, factor = dlogits
        hidden = chunk.hidden
        self.grad_head.add_bias(dlogits, rescale)
        if self.grad_rows is not None:
            if self.needs.hidden:
                grad = self.grad_rows.new_empty(hidden.shape)
                gemm.backproject(values, self.batch.head.weight, out=grad)
            else:
                grad = values.sum(1, keepdim=True, dtype=self.dtype)
            self.grad_rows[chunk.rows] = grad if factor is None else grad.mul_(factor)
        self.grad_head.add_weight(values, hidden if factor is None else hidden * factor, rescale)

    def _correction(self, log_probs: Tensor, rows: Tensor) -> Tensor:
        return objective.distillation_weights(log_probs, self.batch.inputs.select(rows), self.config)

    def _count(self, name: str, value: Tensor | int) -> None:
        self.metrics[name] = self.metrics[name] + (value.sum() if isinstance(value, Tensor) else value)


def _join(logits: Tensor, parts: list[Dlogits]) -> Dlogits:
    """The dlogits of consecutive rows as one, in the place of their ``logits``: there already, as a rule."""
    places = logits.split([len(part.values) for part in parts])
    for place, part in zip(places, parts, strict=True):
        if place.data_ptr() != part.values.data_ptr():
            place.copy_(part.values)
    if all(part.factor is None for part in parts):
        return Dlogits(logits, None)
    factors = [part.values.new_ones(len(part.values), 1) if part.factor is None else part.factor for part in parts]
    return Dlogits(logits, torch.cat(factors))
