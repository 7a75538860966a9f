"""The composable path: per-row statistics that carry gradient into any loss of the caller's.

Forward and backward go over chunks of rows, each with logits of its own: what a product rounds depends on its shape, so
the backward normalizes its logits by their own sums, not by the forward's. A forward without a gradient can do without
logits altogether, in tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from srpo_kernels.engine import columns, gemm, workspace
from srpo_kernels.engine.batch import Head, Needs
from srpo_kernels.engine.columns import Columns
from srpo_kernels.engine.gradients import Gradients
from srpo_kernels.engine.memory import RowMemory
from srpo_kernels.engine.plan import row_chunks
from srpo_kernels.losses.derived import OWN, Derivation
from srpo_kernels.losses.rows import DIFFERENTIABLE
from srpo_kernels.rows import contract
from srpo_kernels.rows.contract import RowGradients, Support
from srpo_kernels.rows.dtypes import accumulation_dtype
from srpo_kernels.rows.passes import Request, RowPasses
from srpo_kernels.rows.spec import RowSpec
from srpo_kernels.rows.teacher_units import to_student_units_


class StatsCall(NamedTuple):
    """What ``token_stats`` works on beside the student: ``rows`` (int64 ``[n]``) of N are computed.

    ``teacher_support`` is a teacher that is its likeliest tokens alone; ``support_ids`` ``[N, S]`` are the tokens that
    rows were sampled from, and ``position`` ``[N]`` where in them a row's own is. ``own`` ``[N]`` are numbers of the
    divergence by name. ``columns``: rows run by those of the head.
    """

    target_ids: Tensor
    rows: Tensor
    spec: RowSpec
    teacher_hidden: Tensor | None
    teacher_head: Head
    workspace_bytes: int | None
    passes: RowPasses
    tiled: bool
    derivation: Derivation
    teacher_support: Support | None = None
    support_ids: Tensor | None = None
    position: Tensor | None = None
    own: Mapping[str, Tensor] = MappingProxyType({})
    columns: bool = False

    @property
    def has_teacher(self) -> bool:
        """Whether there is a divergence."""
        return self.teacher_hidden is not None or self.teacher_support is not None

    @property
    def models(self) -> int:
        """Whose logits there are."""
        return 1 if self.teacher_hidden is None else 2

    @property
    def names(self) -> tuple[str, ...]:
        """What is returned."""
        return Statistics._fields if self.has_teacher else _OF_STUDENT

    @property
    def sources(self) -> frozenset[str]:
        """What of the passes that is made of."""
        return frozenset[str]().union(*map(self.derivation.sources, self.names))


class Statistics(NamedTuple):
    """What ``token_stats`` returns, ``[n]`` each: the first four carry gradient, a teacher's are None without one."""

    log_probs: Tensor
    entropy: Tensor
    divergence: Tensor | None
    logsumexp: Tensor
    teacher_entropy: Tensor | None


_OF_STUDENT = ("log_probs", "entropy", "logsumexp")


class _Chunk(NamedTuple):
    """A ``part`` of the rows: their hidden states as an operand, and what is wanted of both models' logits.

    Or the ``columns`` of the head in their place.
    """

    part: slice
    operand: Tensor
    request: Request
    columns: Columns | None = None


def forward(hidden: Tensor, head: Head, call: StatsCall) -> Statistics:
    """Statistics of ``call.rows``."""
    if call.tiled:
        own = _forward_tiled(hidden, head, call)
        return _named(call, _of_passes(own, call.sources), call.rows)
    found = []
    for chunk in _chunks(hidden, head, call, call.rows):
        own = _computed(chunk._replace(request=chunk.request._replace(gradient=frozenset())), call)
        found.append(_named(call, _of_passes(own, call.sources), call.rows[chunk.part]))
    return Statistics._make(None if x[0] is None else torch.cat(x) for x in zip(*found, strict=True))


def _computed(chunk: _Chunk, call: StatsCall) -> contract.Statistics:
    return call.passes.statistics(chunk.request)[0] if chunk.columns is None else chunk.columns.statistics


def _of_passes(stats: contract.Statistics, names: frozenset[str]) -> dict[str, Tensor]:
    """``[n]`` and ``[n, K]`` by name."""
    values = {name: getattr(stats, name) for name in names}
    return {name: x.squeeze(1) if name == "logsumexp" else x for name, x in values.items()}


def _named(call: StatsCall, statistics: dict[str, Tensor], rows: Tensor) -> Statistics:
    position = None if call.position is None else call.position[rows]
    own = {name: x[rows] for name, x in call.own.items()}
    derived = call.derivation.derive(call.names, statistics, len(rows) if call.has_teacher else 0, position, own)
    if call.has_teacher and not len(rows):
        derived["divergence"] = torch.zeros_like(derived["log_probs"])
    return Statistics(*(derived.get(name) for name in Statistics._fields))  # type: ignore[arg-type]


def _gradients(call: StatsCall, own: contract.Statistics, rows: Tensor, upstream: dict[str, Tensor]) -> RowGradients:
    """Those of the passes' statistics, from those of what is returned."""
    if all(call.derivation.sources(name) == {name} for name in upstream):
        # They are returned as they are: a transform of functorch, which allows no leaves here, can go through.
        return RowGradients(**{name: g.to(own.log_probs.dtype) for name, g in upstream.items()})
    leaves = {
        name: x.detach().requires_grad_() if name in DIFFERENTIABLE else x
        for name, x in _of_passes(own, call.sources).items()
    }
    variables = [name for name in DIFFERENTIABLE if name in leaves]
    with torch.enable_grad():
        named = _named(call, leaves, rows)._asdict()
        outputs = [named[name] for name in upstream]
        grads = [g.to(x.dtype) for g, x in zip(upstream.values(), outputs, strict=True)]
        found = torch.autograd.grad(outputs, [leaves[name] for name in variables], grads, allow_unused=True)
    dtype = own.log_probs.dtype
    return RowGradients(**{name: None if x is None else x.to(dtype) for name, x in zip(variables, found, strict=True)})


def _forward_tiled(hidden: Tensor, head: Head, call: StatsCall) -> contract.Statistics:
    from srpo_kernels.kernels.tiles import Projection, tile_stats

    student, teacher = Projection(hidden[call.rows], *head), None
    if call.teacher_hidden is not None:
        teacher = Projection(call.teacher_hidden[call.rows], *call.teacher_head)
    target_ids = call.target_ids[call.rows] - call.passes.vocabulary.first_id
    return tile_stats(student, teacher, call.spec, target_ids, call.passes.vocabulary.combine)


def backward(
    hidden: Tensor, head: Head, call: StatsCall, upstream: dict[str, Tensor], needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dX ``[N, H]``, dW ``[V, H]``, db ``[V]`` in their inputs' dtypes, for ``upstream`` ``[n]`` by name.

    Rows whose gradients are all 0 cost nothing.
    """
    dtype = accumulation_dtype(hidden, head.weight)
    moving = torch.stack([g != 0 for g in upstream.values()]).any(0).nonzero().squeeze(1)
    rows = call.rows[moving]
    upstream = {name: g[moving] for name, g in upstream.items()}
    grad_states = torch.zeros(len(rows), hidden.shape[1], dtype=dtype, device=hidden.device) if needs.hidden else None
    waiting_dtype, places = gemm.dlogits_dtype(head.weight, dtype), torch.arange(len(rows), device=rows.device)
    waiting_rows = _layout(head, call, len(rows), dtype).waiting
    with workspace.borrowed(waiting_rows, len(head.weight), waiting_dtype, hidden.device) as waiting:
        gradients = Gradients(grad_states, head, needs, dtype, waiting)
        for chunk in _chunks(hidden, head, call, rows) if len(rows) else ():
            own = _computed(chunk, call)
            grads = _gradients(call, own, rows[chunk.part], {name: g[chunk.part] for name, g in upstream.items()})
            if chunk.columns is not None:
                grad = columns.accumulate(
                    chunk.columns, grads, head, gradients.head, call.passes.vocabulary, grad_hidden=needs.hidden
                )
                if grad_states is not None:
                    grad_states[chunk.part] = grad
                continue
            out = gradients.place(chunk.request.logits)
            gradients.add(places[chunk.part], call.passes.dlogits_(chunk.request, own, grads, out=out), chunk.operand)
        gradients.finish()

    grad_head, grad_hidden = gradients.head, None
    call.passes.vocabulary.add_up_(grad_states, rows)
    if grad_states is not None:
        grad_hidden = torch.zeros_like(hidden)
        grad_hidden[rows] = grad_states.to(hidden.dtype)
    grad_weight = None if grad_head.weight is None else grad_head.weight.to(head.weight.dtype)
    grad_bias = None if grad_head.bias is None or head.bias is None else grad_head.bias.to(head.bias.dtype)
    return grad_hidden, grad_weight, grad_bias


class _Layout(NamedTuple):
    """The ``parts`` of the rows, at least one; of the ``longest`` so many have logits, and dlogits that wait."""

    parts: list[slice]
    longest: int
    waiting: int


def _layout(head: Head, call: StatsCall, num_rows: int, dtype: torch.dtype) -> _Layout:
    memory = RowMemory.of(head.weight, dtype, call.passes)
    capacity = min(
        memory.capacity(call.models, call.workspace_bytes), memory.most_rows(call.workspace_bytes) // call.models
    )
    parts = row_chunks(num_rows, capacity) or [slice(0, 0)]
    if call.columns:
        return _Layout(parts, 0, 0)
    longest: int = max(part.stop - part.start for part in parts)
    waiting = memory.waiting_rows(num_rows, longest, call.models * longest, call.workspace_bytes)
    return _Layout(parts, longest, waiting)


def _chunks(hidden: Tensor, head: Head, call: StatsCall, rows: Tensor) -> Iterator[_Chunk]:
    """Both models' logits of ``rows``, a workspace at a time, or their columns of the head; at least one chunk."""
    dtype = accumulation_dtype(hidden, head.weight)
    parts, longest, _ = _layout(head, call, len(rows), dtype)

    def project(states: Tensor, head: Head, ids: Tensor, out: Tensor) -> Tensor:
        operand = states[ids].to(gemm.operand_dtype(head.weight, dtype))
        gemm.project(operand, head.weight, head.bias, out=out)
        return operand

    with workspace.borrowed(call.models * longest, len(head.weight), dtype, hidden.device) as buffer:
        for part in parts:
            ids, y = rows[part], None
            targets = call.target_ids[ids]
            given = None if call.teacher_support is None else Support._make(x[ids] for x in call.teacher_support)
            sampled = None if call.support_ids is None else call.support_ids[ids]
            if call.columns and sampled is not None:
                states, vocabulary = hidden[ids].to(dtype), call.passes.vocabulary
                own = columns.compute(states, head, given, sampled, targets, call.spec, vocabulary, compares=True)
                yield _Chunk(part, states, Request(states, None, call.spec, targets), own)
                continue
            z = buffer[: len(ids)]
            operand = project(hidden, head, ids, z)
            if call.teacher_hidden is not None:
                y = buffer[longest : longest + len(ids)]
                project(call.teacher_hidden, call.teacher_head, ids, y)
                to_student_units_(y, call.spec)
            entropy, spec = "entropy" in call.sources, call.spec
            if y is not None:
                spec = spec.of_rows(ids, *(None if x is None else x[ids] for x in map(call.own.get, OWN)))
            request = Request(z, y, spec, targets, entropy=entropy, support=given, sampled_ids=sampled)
            yield _Chunk(part, operand, request)
