"""The fused path: loss and gradients in one forward, chunk by chunk of rows.

Per chunk: logits by one product, the row passes, the objective on vectors (its autograd gives the coefficients),
dlogits, then dX and dW by one product each. Rows with a teacher come first. The last of them share their products with
the first rows without one where the workspace holds both: few large ones are faster.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from srpo_kernels.engine import columns, gemm
from srpo_kernels.engine.batch import Batch, FusedResult, Head, Needs
from srpo_kernels.engine.chunks import Computed, Part, join, statistic
from srpo_kernels.engine.columns import Columns, NotByColumns
from srpo_kernels.engine.gradients import Gradients
from srpo_kernels.engine.objectives import Evaluation, Objective, evaluate
from srpo_kernels.engine.plan import Chunk, Plan, Segment
from srpo_kernels.losses.divergence import over_support
from srpo_kernels.losses.rows import POSITION, SUPPORT, TEACHER, TEACHER_SUPPORT, NotComputed
from srpo_kernels.rows.contract import Dlogits, RowGradients, Support
from srpo_kernels.rows.dtypes import accumulation_dtype
from srpo_kernels.rows.mixture import KLS
from srpo_kernels.rows.passes import Request, RowPasses
from srpo_kernels.rows.spec import RowSpec
from srpo_kernels.rows.sums import bucket_entropy
from srpo_kernels.rows.teacher_units import to_student_units_


class FusedPass:
    """One run of an objective over a batch, after a plan."""

    def __init__(
        self,
        batch: Batch,
        plan: Plan,
        objective: Objective,
        spec: RowSpec,
        needs: Needs,
        passes: RowPasses,
        buffer: Tensor,
        waiting: Tensor,
    ) -> None:
        self.batch, self.plan, self.objective, self.spec = batch, plan, objective, spec
        self.needs, self.passes, self.buffer = needs, passes, buffer
        self.dtype = accumulation_dtype(batch.hidden, batch.head.weight)
        # Rows in the order in which they are evaluated: a segment's are side by side, gathered and spread once for all.
        self._order = plan.evaluated
        self._inputs = {name: values[self._order] for name, values in batch.inputs.items()}
        self._nothing = batch.hidden.new_empty(0, dtype=self.dtype)
        self._log_probs: list[Tensor] = []
        self._losses: list[Tensor] = []
        # Where hidden states are frozen, the sums of dlogits: they are finite where all dlogits of a row are.
        probe = batch.hidden if needs.hidden else batch.hidden[:, :1]
        of_rows = torch.zeros_like(probe, dtype=self.dtype) if any(needs) else None
        self.gradients = Gradients(of_rows, batch.head, needs, self.dtype, waiting)

    def run(self) -> FusedResult:
        """All segments, then rows that only metrics want.

        Raises NotByColumns where columns of the head were planned, and do not say all that the objective reads.
        """
        if self.objective.teacher_first:
            self.objective.begin(self._teacher_entropies())
        for segment in self.plan.segments:
            evaluation = self._run(segment, gradient=any(self.needs))
            if evaluation.rescale is not None and self._losses:
                self._losses = [torch.cat(self._losses) * evaluation.rescale]
            self._losses.append(evaluation.losses)
        if self.plan.inactive:
            self._run(self.plan.inactive, gradient=False, active=False)
        self.gradients.finish()
        losses, log_probs = self._spread(self._losses), self._spread(self._log_probs)
        finite, of_rows = losses.isfinite(), self.gradients.rows
        if of_rows is not None:
            self.passes.vocabulary.add_up_(of_rows, self.plan.rows)
            # One pass: a sum that is finite has finite terms.
            finite &= of_rows.sum(1).isfinite()
        return FusedResult(
            losses.sum(),
            losses,
            log_probs,
            (~finite).sum(),
            of_rows if self.needs.hidden else None,
            self.gradients.head.weight,
            self.gradients.head.bias,
            self.gradients.scale,
        )

    def _spread(self, parts: list[Tensor]) -> Tensor:
        """Values of the first rows of the order, and 0 for all others, ``[N]``."""
        values = self.batch.hidden.new_zeros(len(self.batch.target_ids), dtype=self.dtype)
        if parts:
            joined = torch.cat(parts)
            values[self._order[: len(joined)]] = joined
        return values

    def _run(self, segment: Segment, *, gradient: bool, active: bool = True) -> Evaluation:
        """Evaluate a segment, and accumulate its gradients."""
        start = sum(map(len, self._log_probs))
        own = slice(start, start + sum(chunk.num_rows for chunk in segment))
        while True:
            for taught, columns_alone in ((True, self.plan.taught_columns), (False, self.plan.columns)):
                if columns_alone and not self.objective.by_columns(taught):
                    raise NotByColumns
            computed = [self._compute(chunk, gradient) for chunk in segment]
            try:
                log_probs, evaluation = self._evaluate(computed, own, gradient, active)
            except NotComputed as missing:
                self.objective.widen(missing.name)
                continue
            known = self.objective.reads(taught=True)[1] | self.objective.reads(taught=False)[1]
            if evaluation.gradients.names <= known:
                break
            self.objective.expect(evaluation.gradients.names)
        self._log_probs.append(log_probs)
        if gradient:
            self._accumulate_segment(segment, computed, evaluation)
        return evaluation

    def _compute(self, chunk: Chunk, gradient: bool) -> Computed:
        """Logits of a chunk at the front of the buffer, the teacher's behind the student's, and their statistics."""
        if self.plan.columns and not len(chunk.taught):
            return self._compute_columns(chunk.alone, taught=False)
        if self.plan.taught_columns and not len(chunk.alone):
            return self._compute_columns(chunk.taught, taught=True)
        rows = chunk.rows
        operand, logits = self._project(self.batch.hidden, rows, rows, self.batch.head, 0)
        taught, alone = logits.split([len(chunk.taught), len(chunk.alone)])
        kinds = [(True, chunk.taught, taught), (False, chunk.alone, alone)]
        requests = [self._request(chunk, own, z, gradient, taught=kind) for kind, own, z in kinds if len(own)]
        stats = self.passes.statistics(*requests)
        present = [(own, kind) for kind, own, _ in kinds if len(own)]
        parts = [
            Part(own, kind, request, reduced)
            for (own, kind), request, reduced in zip(present, requests, stats, strict=True)
        ]
        return Computed(operand, logits, parts)

    def _compute_columns(self, rows: Tensor, *, taught: bool) -> Computed:
        batch, targets = self.batch, self.batch.target_ids[rows]
        assert batch.support_ids is not None
        hidden, given = batch.hidden[rows].to(self.dtype), self._given(rows) if taught else None
        sampled, compares = batch.support_ids[rows], "support_log_probs" in self.objective.reads(taught)[0]
        own = columns.compute(
            hidden, batch.head, given, sampled, targets, self.spec, self.passes.vocabulary, compares=compares
        )
        request = Request(hidden, None, self.spec, targets)
        return Computed(hidden, hidden, [Part(rows, taught, request, own.statistics)], own)

    def _request(self, chunk: Chunk, rows: Tensor, logits: Tensor, gradient: bool, *, taught: bool) -> Request:
        names, gradients = self.objective.reads(taught)
        spec, y, given = replace(self.spec, divergence=None, topk=0), None, None
        if any(name in _OF_TEACHER for name in names):
            given = self._given(rows)
            if given is None:
                y = self._teacher_logits(chunk, chunk.num_rows)
            spec = replace(
                self.spec,
                divergence=self.spec.divergence if "divergence" in names else None,
                kls=frozenset(name for name in KLS if name in names),
                topk=self.spec.topk if "support_log_probs" in names else 0,
            )
            spec = spec.of_rows(rows, *(self._of_row(name, rows) for name in ("divergence_alpha", "divergence_clip")))
        ids, wanted = self.batch.target_ids[rows], gradients if gradient else frozenset()
        sampled = self.batch.support_ids if "sampled_log_probs" in names else None
        sampled = None if sampled is None else sampled[rows]
        return Request(logits, y, spec, ids, "entropy" in names, wanted, given, sampled)

    def _of_row(self, name: str, rows: Tensor) -> Tensor | None:
        values = self.batch.inputs.get(name)
        return None if values is None else values[rows]

    def _given(self, rows: Tensor) -> Support | None:
        """The teacher's likeliest tokens, where they are given in its place."""
        if self.batch.teacher_support is None:
            return None
        at = self.batch.teacher_rows[rows]
        return Support._make(x[at] for x in self.batch.teacher_support)

    def _evaluate(
        self, computed: list[Computed], own: slice, gradient: bool, active: bool
    ) -> tuple[Tensor, Evaluation]:
        """Log-probs of a segment's rows, which are ``own`` of the order, and what the objective makes of them."""
        # Rows with a teacher before those without, whatever the chunk.
        parts = sorted((part for chunk in computed for part in chunk.parts), key=lambda part: not part.taught)
        num_taught = sum(len(part.rows) for part in parts if part.taught)
        names = self.objective.reads(taught=False)[0]
        if num_taught:
            names |= self.objective.reads(taught=True)[0]
        statistics = {name: statistic(name, parts, self._nothing) for name in names}
        inputs = {name: values[own] for name, values in self._inputs.items()}
        sequences = None if self.batch.sequences is None else self.batch.sequences.select(self._order[own])
        kinds = (slice(num_taught), True), (slice(num_taught, None), False)
        log_probs = [self._own_log_probs(statistics, inputs, *kind) for kind in kinds]
        evaluation = evaluate(
            self.objective, statistics, inputs, sequences, num_taught, gradient=gradient, active=active
        )
        return torch.cat(log_probs), evaluation

    def _own_log_probs(
        self, statistics: dict[str, Tensor], inputs: dict[str, Tensor], kind: slice, taught: bool
    ) -> Tensor:
        """Of rows of a kind, over the tokens that they were sampled from where these matter."""
        log_probs = statistics["log_probs"][kind]
        if "sampled_log_probs" not in self.objective.reads(taught)[0]:
            return log_probs
        return over_support(log_probs, statistics["sampled_log_probs"][kind], inputs[POSITION][kind])[0]

    def _accumulate_segment(self, segment: Segment, known: list[Computed], evaluation: Evaluation) -> None:
        """Add the gradients of all chunks; the last one's logits are still in the buffer, the others' come again."""
        if evaluation.rescale is not None:
            self.gradients.rescale(evaluation.rescale)
        gradients = evaluation.gradients.divided_by(self.gradients.scale)
        taught, alone = sum(len(chunk.taught) for chunk in segment), sum(len(chunk.alone) for chunk in segment)
        ends = {True: taught, False: taught + alone}
        for i, chunk in reversed(list(enumerate(segment))):
            computed = known[i]
            if computed.columns is not None:
                (part,) = computed.parts
                own = slice(ends[part.taught] - len(part.rows), ends[part.taught])
                self._accumulate_columns(computed.columns, part.rows, gradients.select(own))
                ends[part.taught] = own.start
                continue
            if i < len(segment) - 1:
                computed = self._compute(chunk, gradient=True)
            if not computed.parts:
                continue
            dlogits, out = [], self.gradients.place(computed.logits)
            places = out.split([len(part.rows) for part in computed.parts])
            for part, place in zip(computed.parts, places, strict=True):
                own = slice(ends[part.taught] - len(part.rows), ends[part.taught])
                dlogits.append(self._dlogits_(part, gradients.select(own), place))
                ends[part.taught] = own.start
            self.gradients.add(chunk.rows, join(out, dlogits), computed.operand)

    def _accumulate_columns(self, own: Columns, rows: Tensor, gradients: RowGradients) -> None:
        grad = columns.accumulate(
            own,
            gradients,
            self.batch.head,
            self.gradients.head,
            self.passes.vocabulary,
            grad_hidden=self.needs.hidden,
        )
        if self.gradients.rows is not None:
            self.gradients.rows[rows] = grad

    def _dlogits_(self, part: Part, gradients: RowGradients, out: Tensor) -> Dlogits:
        """Of the statistics whose gradients the buffer was left for; 0 of those that turned out to have none."""
        _, expected = self.objective.reads(part.taught)
        own: dict[str, Tensor | None] = {name: getattr(gradients, name) for name in expected}
        for name in own:
            if own[name] is None:
                own[name] = torch.zeros_like(statistic(name, [part], self._nothing))
        return self.passes.dlogits_(part.request, part.stats, RowGradients(**own), out=out)

    def _teacher_entropies(self) -> Tensor:
        if self.batch.teacher_support is not None:
            known = self.batch.teacher_support.log_probs
            assert known is not None
            return bucket_entropy(known[self.batch.teacher_rows[self.plan.order.taught]])
        entropies = []
        spec = replace(self.spec, transform=self.spec.teacher_transform, divergence=None, topk=0)
        for chunk in (chunk for segment in self.plan.segments for chunk in segment if len(chunk.taught)):
            logits, ids = self._teacher_logits(chunk, 0), self.batch.target_ids[chunk.taught]
            (stats,) = self.passes.statistics(Request(logits, None, spec, ids, entropy=True, gradient=frozenset()))
            assert stats.entropy is not None
            entropies.append(stats.entropy)
        return torch.cat(entropies)

    def _teacher_logits(self, chunk: Chunk, offset: int) -> Tensor:
        """Of the rows with a teacher, from ``offset`` of the buffer on: a product for each head that they have."""
        batch, count = self.batch, len(chunk.taught)
        assert batch.teacher_hidden is not None
        start = offset
        by_head = chunk.taught.split(chunk.by_head or [count])
        for head, rows in zip(batch.teacher_heads, by_head, strict=True):
            if len(rows):
                self._project(batch.teacher_hidden, batch.teacher_rows[rows], rows, head, start)
                start += len(rows)
        return to_student_units_(self.buffer[offset : offset + count], self.spec)

    def _project(self, hidden: Tensor, states: Tensor, rows: Tensor, head: Head, offset: int) -> tuple[Tensor, Tensor]:
        """Hidden states as an operand, and their logits in the buffer."""
        logits = self.buffer[offset : offset + len(rows)]
        operand = hidden[states].to(gemm.operand_dtype(head.weight, self.dtype))
        gemm.project(operand, head.weight, head.bias, out=logits)
        return operand, logits


# What takes the teacher's logits.
_OF_TEACHER = frozenset({"divergence", "forward_kl", "reverse_kl", *TEACHER, *SUPPORT, *TEACHER_SUPPORT})
