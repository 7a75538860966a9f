"""In which chunks rows are computed, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from srpo_kernels.engine.memory import RowMemory
from srpo_kernels.engine.order import RowOrder


def row_chunks(num_rows: int, capacity: int) -> list[slice]:
    """Split ``num_rows`` into the fewest chunks of at most ``capacity`` rows, nearly equal ones."""
    count = -(-num_rows // capacity)
    bounds = [num_rows * i // count for i in range(count + 1)] if count else [0]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


class Chunk(NamedTuple):
    """Rows whose logits are alive at a time, and whose products are taken together: indices of ``RowOrder``'s kinds.

    Of several teacher heads, ``by_head`` is how many of the rows with a teacher, in their order, each has.
    """

    taught: Tensor
    alone: Tensor
    by_head: tuple[int, ...] = ()

    @property
    def rows(self) -> Tensor:
        """Those with a teacher before those without."""
        return self.alone if not len(self.taught) else torch.cat([self.taught, self.alone])

    @property
    def num_rows(self) -> int:
        """Of both kinds."""
        return len(self.taught) + len(self.alone)

    @property
    def logits(self) -> int:
        """Rows of logits, of both models."""
        return 2 * len(self.taught) + len(self.alone)


# Chunks whose objective is evaluated together. All but the last of several are computed twice, their logits being gone
# when their gradient is known.
Segment = list[Chunk]


@dataclass(frozen=True)
class Plan:
    """How one call runs: its rows in segments, those that only metrics want in one of their own, and what that costs.

    ``columns``: rows without a teacher have no logits but those of a few tokens, and cost no product;
    ``taught_columns``: rows with one.

    ``student_products`` and ``teacher_products`` count rows times products, in units of ``H * V`` multiply-adds: 3 per
    row without a teacher, 4 per row with one.
    """

    order: RowOrder
    segments: list[Segment]
    inactive: Segment
    memory: RowMemory
    workspace_bytes: int | None
    student_products: int
    teacher_products: int
    columns: bool = False
    taught_columns: bool = False

    @property
    def buffer_rows(self) -> int:
        """Rows of logits, of either model, that are alive at a time."""
        return max((2 * taught + alone for taught, alone in self._rows_of_chunks(self.inactive)), default=0)

    @property
    def waiting_rows(self) -> int:
        """Rows of dlogits that wait for their products."""
        rows = [taught + alone for taught, alone in self._rows_of_chunks([])]
        return self.memory.waiting_rows(sum(rows), max(rows, default=0), self.buffer_rows, self.workspace_bytes)

    @property
    def head_products(self) -> int:
        """Products whose sum is dW."""
        products, room = 0, 0
        for rows in map(sum, self._rows_of_chunks([])):
            if rows > room:
                products, room = products + 1, max(self.waiting_rows, rows)
            room -= rows
        return products

    def _rows_of_chunks(self, more: Segment) -> list[tuple[int, int]]:
        """With a teacher and without, of those that have logits."""
        chunks = [chunk for segment in [*self.segments, more] for chunk in segment]
        return [((not self.taught_columns) * len(x.taught), (not self.columns) * len(x.alone)) for x in chunks]

    @property
    def rows(self) -> Tensor:
        """The rows that have a gradient."""
        return torch.cat([self.order.taught, self.order.alone])

    @property
    def evaluated(self) -> Tensor:
        """All rows that an objective sees, segment by segment; of each, those with a teacher before the others."""
        parts = [self.order.taught[:0]]
        for segment in [*self.segments, self.inactive]:
            parts += [chunk.taught for chunk in segment] + [chunk.alone for chunk in segment]
        return torch.cat(parts)


def make_plan(
    order: RowOrder,
    memory: RowMemory,
    *,
    taught_lengths: list[int] | None = None,
    alone_lengths: list[int] | None = None,
    workspace_bytes: int | None,
    gradients: int,
    count_inactive: bool = False,
    teacher_first: bool = False,
    teacher_logits: bool = True,
    columns: bool = False,
    taught_columns: bool = False,
    joins: bool = False,
    head_ids: Tensor | None = None,
    heads: int = 1,
) -> Plan:
    """Lay out the chunks.

    ``alone_lengths`` are how many rows without a teacher each sequence has, where an objective sees them together;
    ``taught_lengths`` those with one, where it sees these with them. ``gradients`` is how many of dX and dW are
    wanted. Without ``teacher_logits``, what is known of the teacher costs no product. Where one kind of rows runs by
    ``columns``, no chunk has rows of both. ``joins``: an objective takes part in exchanges, without a row too.
    ``head_ids``: which of the teacher's ``heads`` a row with a teacher has, int64 ``[N]``.
    """
    apart = columns or taught_columns
    alone_rows, taught_rows, together = memory.chunk_rows(workspace_bytes, whole=alone_lengths is not None)
    if head_ids is not None and taught_lengths is None:
        # Few heads in a chunk: their products are large.
        order = order._replace(taught=order.taught[head_ids[order.taught].argsort(stable=True)])
    none = order.taught[:0]
    if taught_lengths is not None and alone_lengths is not None:
        segments = _whole_sequences(order, taught_lengths, alone_lengths, alone_rows, taught_rows, together, apart)
    else:
        segments = [[Chunk(order.taught[ids], none)] for ids in row_chunks(len(order.taught), taught_rows)]
        if alone_lengths is None:
            alone = [[Chunk(none, order.alone[ids])] for ids in row_chunks(len(order.alone), alone_rows)]
        else:
            nobody = [0] * len(alone_lengths)
            alone = _whole_sequences(order, nobody, alone_lengths, alone_rows, taught_rows, alone_rows, apart)
        # Few large products are faster than many small ones.
        if segments and alone and len(alone[0]) == 1 and not apart:
            both = Chunk(segments[-1][0].taught, alone[0][0].alone)
            if both.logits <= together:
                segments[-1:], alone = [[both]], alone[1:]
        segments += alone
    if joins and not len(order.alone):
        segments.append([Chunk(none, none)])
    if head_ids is not None:
        segments = _sorted_by_head(segments, head_ids, heads)
    inactive = [Chunk(none, order.inactive[ids]) for ids in row_chunks(len(order.inactive), alone_rows)]
    if joins and not inactive:
        inactive = [Chunk(none, none)]
    again = [chunk for segment in segments for chunk in segment[:-1]] if gradients else []
    taught, twice = len(order.taught), sum(len(chunk.taught) for chunk in again)
    alone_products = (
        len(order.alone) * (1 + gradients)
        + sum(len(chunk.alone) for chunk in again)
        + len(order.inactive) * count_inactive
    )
    return Plan(
        order,
        segments,
        inactive if count_inactive else [],
        memory,
        workspace_bytes,
        (taught * (1 + gradients) + twice) * (not taught_columns) + alone_products * (not columns),
        (taught * (1 + teacher_first) + twice) * teacher_logits,
        columns,
        taught_columns,
    )


def _sorted_by_head(segments: list[Segment], head_ids: Tensor, heads: int) -> list[Segment]:
    """Rows of one teacher head side by side in each chunk, for one product of each: a host read."""
    chunks = [chunk for segment in segments for chunk in segment]
    if not chunks:
        return segments
    orders = [head_ids[chunk.taught].argsort(stable=True) for chunk in chunks]
    each = torch.arange(heads, device=head_ids.device)
    counts = torch.stack([(head_ids[chunk.taught, None] == each).sum(0) for chunk in chunks]).tolist()
    ordered = (
        chunk._replace(taught=chunk.taught[order], by_head=tuple(own))
        for chunk, order, own in zip(chunks, orders, counts, strict=True)
    )
    return [[next(ordered) for _ in segment] for segment in segments]


def sequence_groups(sizes: list[int], capacity: int) -> list[slice]:
    """Group consecutive sequences of these sizes: as many as fit into ``capacity``, or one that does not."""
    groups: list[slice] = []
    start, total = 0, 0
    for stop, size in enumerate(sizes):
        if total and total + size > capacity:
            groups.append(slice(start, stop))
            start, total = stop, 0
        total += size
    return [*groups, slice(start, len(sizes))] if total else groups


def _whole_sequences(
    order: RowOrder,
    taught_lengths: list[int],
    alone_lengths: list[int],
    alone_rows: int,
    taught_rows: int,
    together: int,
    apart: bool,
) -> list[Segment]:
    """Segments that cut no sequence: one chunk of as many as fit, or several chunks of one long sequence.

    ``apart``: rows with a teacher and without are never in one chunk; the latter come first, and are there still when
    their gradient is known if they run by columns.
    """
    taught_ends, alone_ends = (list(accumulate(x, initial=0)) for x in (taught_lengths, alone_lengths))
    sizes = [2 * t + a for t, a in zip(taught_lengths, alone_lengths, strict=True)]
    segments: list[Segment] = []
    for group in sequence_groups(sizes, together):
        taught = order.taught[taught_ends[group.start] : taught_ends[group.stop]]
        alone = order.alone[alone_ends[group.start] : alone_ends[group.stop]]
        whole = Chunk(taught, alone)
        if whole.logits <= together and not (apart and len(taught) and len(alone)):
            segments.append([whole])
            continue
        first = [Chunk(taught[ids], alone[:0]) for ids in row_chunks(len(taught), taught_rows)]
        second = [Chunk(taught[:0], alone[ids]) for ids in row_chunks(len(alone), alone_rows)]
        segments.append(second + first if apart else first + second)
    return segments
