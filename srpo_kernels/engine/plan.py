"""Which rows are computed, in which order and chunks, and what that costs.

Rows that cannot move a weight are left out: masked ones, and policy rows whose advantage is 0 while neither the KL nor
the entropy term is on. The row index is built once, with one read by the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from srpo_kernels.distributed import sum_ranks
from srpo_kernels.engine import gemm
from srpo_kernels.engine.vocabulary import Vocabulary
from srpo_kernels.engine.workspace import row_stride
from srpo_kernels.losses.config import SRPOConfig
from srpo_kernels.rows.contract import RowPasses, Scratch

# Where none is given: enough rows for the products to run near their best at vocabularies up to 262k.
_DEFAULT_WORKSPACE_CPU = 640 << 20
_ROWS_ACCELERATOR = 1024
# Beyond this spread of -dw_beta * H_t, weights that are normalised only at the end could leave fp32's range.
_MAX_LOG_WEIGHT_SPREAD = 60.0


@dataclass(frozen=True)
class RowOrder:
    """Row indices into the flattened batch, int64.

    ``policy`` is sorted by sequence; ``inactive`` are valid policy rows that cannot move a weight.
    """

    distillation: Tensor
    policy: Tensor
    inactive: Tensor


def order_rows(
    valid: Tensor,
    routed: Tensor,
    advantages: Tensor,
    sequences: Tensor | None,
    num_sequences: int,
    config: SRPOConfig,
    group: ProcessGroup | None = None,
) -> RowOrder:
    """Sort rows into distillation, active policy, inactive policy and masked ones.

    ``valid`` and ``routed`` are bool ``[N]``, ``advantages`` ``[N]``, ``sequences`` int64 ``[N]`` (for gspo, which is
    active by the sequence: a token with advantage 0 still moves the sequence's ratio). ``group`` has the ranks with
    other rows of the sequences.
    """
    policy = valid & ~routed
    moves = advantages != 0
    if config.kl_coef != 0.0 or config.entropy_coef != 0.0:
        moves = torch.ones_like(moves)
    elif config.loss_type == "gspo" and sequences is not None:
        moving = torch.zeros(num_sequences, dtype=torch.int64, device=valid.device)
        moves = sum_ranks(moving.index_add_(0, sequences, (policy & moves).long()), group)[sequences] > 0
    kind = torch.full_like(advantages, 3, dtype=torch.int64)
    kind[policy] = 2
    kind[policy & moves] = 1
    kind[valid & routed] = 0
    key = kind if sequences is None else kind * num_sequences + sequences
    order = torch.argsort(key, stable=True)
    distillation, active, inactive, _ = order.split(torch.bincount(kind, minlength=4).tolist())
    return RowOrder(distillation, active, inactive)


@dataclass(frozen=True)
class RowMemory:
    """What a row costs while it is computed: its logits in every model, its scratch, its dlogits where they move.

    ``copy_itemsize`` is the size of an element of dlogits that cannot take the place of the logits, else 0. ``shards``
    is how many times the vocabulary has more ids than the ``vocab_size`` of the largest shard.
    """

    vocab_size: int
    itemsize: int
    scratch: Scratch
    device: torch.device
    copy_itemsize: int = 0
    shards: int = 1

    @classmethod
    def of(
        cls, weight: Tensor, dtype: torch.dtype, passes: RowPasses, vocabulary: Vocabulary | None = None
    ) -> RowMemory:
        """For logits in ``dtype`` of the head ``weight``: ``[V, H]``, or a shard of a vocabulary."""
        if vocabulary is None:
            vocabulary = Vocabulary.whole(len(weight))
        copy, width = gemm.operand_dtype(weight, dtype), vocabulary.largest
        scratch, shards = passes.scratch(width, weight.device), vocabulary.size // width
        copy_itemsize = 0 if copy == dtype else copy.itemsize
        return cls(width, dtype.itemsize, scratch, weight.device, copy_itemsize, shards)

    def floor(self, models: int) -> int:
        """Bytes that one row of ``models`` models needs."""
        return self._logits(models) + self.scratch.blocks * self._logits(1, copy=False)

    def capacity(self, models: int, workspace_bytes: int | None) -> int:
        """Rows of a chunk that fit into the workspace; a default where none is given."""
        if workspace_bytes is None:
            if self.device.type != "cpu":
                # A shard's rows are short: as much memory as for the whole vocabulary takes fewer exchanges.
                return _ROWS_ACCELERATOR * self.shards
            workspace_bytes = max(_DEFAULT_WORKSPACE_CPU, self.floor(models))
        # Scratch is for a block of rows at most, and for no more rows than the chunk has.
        block = self.scratch.blocks * self.scratch.rows * self._logits(1, copy=False)
        beside_a_block = (workspace_bytes - block) // self._logits(models)
        capacity = max(beside_a_block, min(self.scratch.rows, workspace_bytes // self.floor(models)), 1)
        if self.device.type != "cpu" and capacity > _ROWS_ACCELERATOR:
            capacity -= capacity % _ROWS_ACCELERATOR
        return capacity

    def _logits(self, models: int, copy: bool = True) -> int:
        return row_stride(self.vocab_size) * (models * self.itemsize + copy * self.copy_itemsize)


def row_chunks(num_rows: int, capacity: int) -> list[slice]:
    """Split ``num_rows`` into the fewest chunks of at most ``capacity`` rows, nearly equal ones."""
    count = -(-num_rows // capacity)
    bounds = [num_rows * i // count for i in range(count + 1)] if count else [0]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def sequence_segments(lengths: list[int], capacity: int) -> list[list[slice]]:
    """Group rows that are sorted by sequence so that no group cuts a sequence.

    Each group is a list of chunks of at most ``capacity`` rows: one chunk with as many whole sequences as fit, or
    several chunks of one long sequence.
    """
    segments: list[list[slice]] = []
    start = stop = 0
    for length in [*(n for n in lengths if n), 0]:
        if length == 0 or stop + length - start > capacity:
            if stop > start:
                chunks = row_chunks(stop - start, capacity)
                segments.append([slice(c.start + start, c.stop + start) for c in chunks])
            start = stop
        stop += length
    return segments


def weights_need_teacher_first(config: SRPOConfig, vocab_size: int) -> bool:
    """Whether entropy weights may span more than fp32 can hold until their mean is known.

    Entropies lie in ``[0, log V]``; where ``dw_beta`` spreads the weights too far, the teacher's entropies are
    computed in a pass of their own (one more product per distillation row).
    """
    return config.dw_beta * math.log(vocab_size) > _MAX_LOG_WEIGHT_SPREAD


@dataclass(frozen=True)
class Plan:
    """How one call runs: rows, their chunks (slices of the index vectors), and what it costs.

    ``policy_segments`` are lists of chunks whose objective is evaluated together. A segment of several chunks, which
    only gspo has, computes its log-probs first and its logits once more. ``shared_policy_rows`` is the length of the
    first segment where its logits are beside those of the last distillation chunk, else 0. ``student_products`` and
    ``teacher_products`` count rows times products, in units of ``H * V`` multiply-adds: 3 per active policy row, 4 per
    distillation row.
    """

    order: RowOrder
    distillation_chunks: list[slice]
    policy_segments: list[list[slice]]
    inactive_chunks: list[slice]
    shared_policy_rows: int
    teacher_first: bool
    student_products: int
    teacher_products: int

    @property
    def buffer_rows(self) -> int:
        """Rows of logits, of either model, that are alive at a time."""
        policy = [chunk for segment in self.policy_segments for chunk in segment]
        widths = [2 * _length(chunk) for chunk in self.distillation_chunks]
        shared = [widths[-1] + self.shared_policy_rows] if widths else []
        return max(widths + shared + [_length(chunk) for chunk in policy + self.inactive_chunks], default=0)


def make_plan(
    order: RowOrder,
    sequence_lengths: list[int] | None,
    config: SRPOConfig,
    *,
    memory: RowMemory,
    vocab_size: int,
    workspace_bytes: int | None,
    gradients: int,
    log_mean_known: bool,
) -> Plan:
    """Lay out the chunks. ``sequence_lengths`` are those of the active policy rows, for gspo alone.

    ``memory`` is that of the logits in this process, ``vocab_size`` is of the whole vocabulary.
    ``gradients`` is how many of dX and dW are wanted.
    """
    policy_rows = memory.capacity(1, workspace_bytes)
    distillation_rows = memory.capacity(2, workspace_bytes)
    if sequence_lengths is None:
        segments = [[chunk] for chunk in row_chunks(len(order.policy), policy_rows)]
    else:
        segments = sequence_segments(sequence_lengths, policy_rows)
    inactive = len(order.inactive) if config.count_inactive else 0
    distilled = len(order.distillation)
    distillation_chunks = row_chunks(distilled, distillation_rows)
    teacher_first = bool(distilled) and not log_mean_known and weights_need_teacher_first(config, vocab_size)
    # Where nothing else is asked for, as many as both models' of a full chunk.
    together = policy_rows if workspace_bytes is not None else max(policy_rows, 2 * distillation_rows)
    repeated = sum(_length(chunk) for segment in segments for chunk in segment[:-1])
    return Plan(
        order,
        distillation_chunks,
        segments,
        row_chunks(inactive, policy_rows),
        _shared_policy_rows(distillation_chunks, segments, together),
        teacher_first,
        (len(order.policy) + distilled) * (1 + gradients) + (repeated if gradients else 0) + inactive,
        distilled * (1 + teacher_first),
    )


def _shared_policy_rows(distillation_chunks: list[slice], segments: list[list[slice]], capacity: int) -> int:
    """Rows of the first policy segment if they fit beside the last distillation chunk, else 0."""
    if not distillation_chunks or not segments or len(segments[0]) > 1:
        return 0
    rows = _length(segments[0][0])
    return rows if 2 * _length(distillation_chunks[-1]) + rows <= capacity else 0


def _length(chunk: slice) -> int:
    return int(chunk.stop - chunk.start)
