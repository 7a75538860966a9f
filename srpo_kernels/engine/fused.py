"""The fused path: loss and gradients in one forward, chunk by chunk of rows.

Per chunk: logits by one product, the row passes, the objective on vectors (its autograd gives the coefficients),
dlogits in the same buffer, then dX and dW by one product each. Rows with a teacher come first. The last of them share
their products with the first rows without one where the workspace holds both: few large ones are faster.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from srpo_kernels.engine import gemm
from srpo_kernels.engine.batch import Batch, FusedResult, Head, Needs
from srpo_kernels.engine.objectives import Evaluation, Objective, evaluate
from srpo_kernels.engine.plan import Chunk, Plan, Segment
from srpo_kernels.losses.rows import SUPPORT, TEACHER, TEACHER_SUPPORT, NotComputed
from srpo_kernels.rows.contract import Dlogits, RowGradients, RowSpec, Statistics
from srpo_kernels.rows.dtypes import accumulation_dtype
from srpo_kernels.rows.passes import Request, RowPasses


class _Part(NamedTuple):
    """Rows of a chunk that all have a teacher, or all have none: their logits, and what was reduced of them."""

    rows: Tensor
    taught: bool
    request: Request
    stats: Statistics


class _Computed(NamedTuple):
    """A chunk: its hidden states as an operand, the student's logits of all of it, and its parts that are not empty."""

    operand: Tensor
    logits: Tensor
    parts: list[_Part]


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
    ) -> None:
        self.batch, self.plan, self.objective, self.spec = batch, plan, objective, spec
        self.needs, self.passes, self.buffer = needs, passes, buffer
        self.dtype = accumulation_dtype(batch.hidden, batch.head.weight)
        self.operand_dtype = gemm.operand_dtype(batch.head.weight, self.dtype)
        self.log_probs = batch.hidden.new_zeros(len(batch.target_ids), dtype=self.dtype)
        self.losses = torch.zeros_like(self.log_probs)
        # Where hidden states are frozen, the sums of dlogits: they are finite where all dlogits of a row are.
        probe = batch.hidden if needs.hidden else batch.hidden[:, :1]
        self.grad_rows = torch.zeros_like(probe, dtype=self.dtype) if any(needs) else None
        self.grad_head = gemm.HeadGradient(
            batch.head.weight if needs.weight else None, batch.head.bias if needs.bias else None, self.dtype
        )

    def run(self) -> FusedResult:
        """All segments, then rows that only metrics want."""
        if self.objective.teacher_first:
            self.objective.begin(self._teacher_entropies())
        loss = self.log_probs.new_zeros(())
        for segment in self.plan.segments:
            rows, evaluation = self._run(segment, gradient=any(self.needs))
            self.losses[rows] = evaluation.losses
            if evaluation.rescale is not None:
                loss = loss * evaluation.rescale
            loss = loss + evaluation.losses.sum()
        if self.plan.inactive:
            self._run(self.plan.inactive, gradient=False, active=False)
        self.grad_head.finish()
        finite = self.losses.isfinite()
        if self.grad_rows is not None:
            self.passes.vocabulary.add_up_(self.grad_rows, self.plan.rows)
            finite &= self.grad_rows.isfinite().all(1)
        return FusedResult(
            loss,
            self.losses,
            self.log_probs,
            (~finite).sum(),
            self.grad_rows if self.needs.hidden else None,
            self.grad_head.weight,
            self.grad_head.bias,
        )

    def _run(self, segment: Segment, *, gradient: bool, active: bool = True) -> tuple[Tensor, Evaluation]:
        """Evaluate a segment, and accumulate its gradients."""
        while True:
            computed = [self._compute(chunk, gradient) for chunk in segment]
            rows = torch.cat([chunk.taught for chunk in segment] + [chunk.alone for chunk in segment])
            try:
                evaluation = self._evaluate(computed, rows, gradient, active)
            except NotComputed as missing:
                self.objective.widen(frozenset({missing.name}))
                continue
            known = self.objective.reads(taught=True)[1] | self.objective.reads(taught=False)[1]
            if evaluation.gradients.names <= known:
                break
            self.objective.widen(evaluation.gradients.names)
        if gradient:
            self._accumulate_segment(segment, computed[-1], evaluation)
        return rows, evaluation

    def _compute(self, chunk: Chunk, gradient: bool) -> _Computed:
        """Logits of a chunk at the front of the buffer, the teacher's behind the student's, and their statistics."""
        rows = chunk.alone if not len(chunk.taught) else torch.cat(chunk)
        operand, logits = self._project(self.batch.hidden, rows, rows, self.batch.head, 0)
        taught, alone = logits.split([len(chunk.taught), len(chunk.alone)])
        kinds = [(True, chunk.taught, taught), (False, chunk.alone, alone)]
        requests = [self._request(own, z, len(rows), gradient, taught=kind) for kind, own, z in kinds if len(own)]
        stats = self.passes.statistics(*requests)
        present = [(own, kind) for kind, own, _ in kinds if len(own)]
        parts = [
            _Part(own, kind, request, reduced)
            for (own, kind), request, reduced in zip(present, requests, stats, strict=True)
        ]
        return _Computed(operand, logits, parts)

    def _request(self, rows: Tensor, logits: Tensor, offset: int, gradient: bool, *, taught: bool) -> Request:
        names, gradients = self.objective.reads(taught)
        spec, y = replace(self.spec, divergence=None, topk=0), None
        if any(name in _OF_TEACHER for name in names):
            y = self._teacher_logits(rows, offset)
            spec = replace(
                self.spec,
                divergence=self.spec.divergence if "divergence" in names else None,
                topk=self.spec.topk if "support_log_probs" in names else 0,
            )
        wanted = gradients if gradient else frozenset()
        return Request(logits, y, spec, self.batch.target_ids[rows], "entropy" in names, wanted)

    def _evaluate(self, computed: list[_Computed], rows: Tensor, gradient: bool, active: bool) -> Evaluation:
        # Rows with a teacher before those without, whatever the chunk.
        parts = sorted((part for chunk in computed for part in chunk.parts), key=lambda part: not part.taught)
        num_taught = sum(len(part.rows) for part in parts if part.taught)
        names = self.objective.reads(taught=False)[0]
        if num_taught:
            names |= self.objective.reads(taught=True)[0]
        statistics = {name: self._statistic(name, parts) for name in names}
        self.log_probs[rows] = statistics["log_probs"]
        return evaluate(
            self.objective,
            statistics,
            {name: values[rows] for name, values in self.batch.inputs.items()},
            None if self.batch.sequences is None else self.batch.sequences.select(rows),
            num_taught,
            gradient=gradient,
            active=active,
        )

    def _statistic(self, name: str, parts: list[_Part]) -> Tensor:
        """Of all parts; 0 in those that do not have it."""
        values: list[Tensor | None] = [getattr(part.stats, name) for part in parts]
        like = next((x for x in values if x is not None), self.log_probs[:0])
        present = [
            like.new_zeros(len(part.rows), *like.shape[1:]) if x is None else x
            for part, x in zip(parts, values, strict=True)
        ]
        return present[0] if len(present) == 1 else torch.cat([like[:0], *present])

    def _accumulate_segment(self, segment: Segment, last: _Computed, evaluation: Evaluation) -> None:
        """Add the gradients of all chunks; the last one's logits are still in the buffer, the others' come again."""
        rescale = evaluation.rescale
        if rescale is not None and self.grad_rows is not None:
            self.grad_rows.mul_(rescale)
        taught, alone = sum(len(chunk.taught) for chunk in segment), sum(len(chunk.alone) for chunk in segment)
        ends = {True: taught, False: taught + alone}
        for i, chunk in reversed(list(enumerate(segment))):
            computed = last if i == len(segment) - 1 else self._compute(chunk, gradient=True)
            dlogits = []
            for part in computed.parts:
                start = ends[part.taught] - len(part.rows)
                dlogits.append(self._dlogits_(part, evaluation.gradients.select(slice(start, ends[part.taught]))))
                ends[part.taught] = start
            self._accumulate(computed, dlogits, rescale)
            rescale = None

    def _dlogits_(self, part: _Part, gradients: RowGradients) -> Dlogits:
        """Of the statistics whose gradients the buffer was left for; 0 of those that turned out to have none."""
        _, expected = self.objective.reads(part.taught)
        own = {name: getattr(gradients, name) for name in expected}
        own = {name: torch.zeros_like(getattr(part.stats, name)) if x is None else x for name, x in own.items()}
        return self.passes.dlogits_(part.request, part.stats, RowGradients(**own), dtype=self.operand_dtype)

    def _teacher_entropies(self) -> Tensor:
        entropies = []
        spec = replace(self.spec, divergence=None, topk=0)
        for rows in (chunk.taught for segment in self.plan.segments for chunk in segment if len(chunk.taught)):
            logits, ids = self._teacher_logits(rows, 0), self.batch.target_ids[rows]
            (stats,) = self.passes.statistics(Request(logits, None, spec, ids, entropy=True, gradient=frozenset()))
            assert stats.entropy is not None
            entropies.append(stats.entropy)
        return torch.cat(entropies)

    def _teacher_logits(self, rows: Tensor, offset: int) -> Tensor:
        batch = self.batch
        assert batch.teacher_hidden is not None
        return self._project(batch.teacher_hidden, batch.teacher_rows[rows], rows, batch.teacher_head, offset)[1]

    def _project(self, hidden: Tensor, states: Tensor, rows: Tensor, head: Head, offset: int) -> tuple[Tensor, Tensor]:
        """Hidden states as an operand, and their logits in the buffer."""
        logits = self.buffer[offset : offset + len(rows)]
        operand = hidden[states].to(gemm.operand_dtype(head.weight, self.dtype))
        gemm.project(operand, head.weight, head.bias, out=logits)
        return operand, logits

    def _accumulate(self, computed: _Computed, dlogits: list[Dlogits], rescale: Tensor | None) -> None:
        """Add a chunk's dX rows and its part of dW and db, what was there before times ``rescale``."""
        rows = [part.rows for part in computed.parts]
        places = [part.request.logits.data_ptr() for part in computed.parts]
        if len(rows) > 1 and places == [x.values.data_ptr() for x in dlogits]:
            rows, dlogits = [torch.cat(rows)], [_join(computed.logits, dlogits)]
        for own, part, operand in zip(rows, dlogits, computed.operand.split([len(x) for x in rows]), strict=True):
            values, factor = part
            self.grad_head.add_bias(part, rescale)
            if self.grad_rows is not None:
                if self.needs.hidden:
                    grad = self.grad_rows.new_empty(operand.shape)
                    gemm.backproject(values, self.batch.head.weight, out=grad)
                else:
                    grad = values.sum(1, keepdim=True, dtype=self.dtype)
                self.grad_rows[own] = grad if factor is None else grad.mul_(factor)
            self.grad_head.add_weight(values, operand if factor is None else operand * factor, rescale)
            rescale = None


# What takes the teacher's logits.
_OF_TEACHER = frozenset({"divergence", *TEACHER, *SUPPORT, *TEACHER_SUPPORT})


def _join(logits: Tensor, parts: list[Dlogits]) -> Dlogits:
    """The dlogits of consecutive rows as one."""
    if all(part.factor is None for part in parts):
        return Dlogits(logits, None)
    factors = [logits.new_ones(len(part.values), 1) if part.factor is None else part.factor for part in parts]
    return Dlogits(logits, torch.cat(factors))
