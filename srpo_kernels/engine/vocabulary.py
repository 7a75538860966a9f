"""The vocabulary and the part of it that this process holds: all of it, or a shard of the rows of the LM head.

Ranks find out about each other's shards, and whether one of them refuses the call, in one small exchange that opens
every call. It is not remembered: two heads may have shards of one size on this rank and of two on another, so that only
some ranks would have to ask again, and those would wait for the others.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from srpo_kernels.distributed import gather_numbers, gather_ranks, group_of, sum_ranks_
from srpo_kernels.engine.arguments import LossArguments, LossOptions, StatsArguments, StatsOptions
from srpo_kernels.engine.batch import Needs
from srpo_kernels.rows.sums import ModelSums, merge

# The arguments whose first dimension is the vocabulary: a rank's own. All others are the same on all ranks.
_SHARDED = ("weight", "bias", "teacher_weight", "teacher_bias")


@dataclass(frozen=True)
class Vocabulary:
    """``size`` ids, of which this process's head has those from ``first_id`` on; ``group`` has the other shards.

    ``largest`` is the size of the largest shard: what all ranks lay their chunks out by. ``waiting`` are values for the
    next exchange, and where what is gathered of them goes.
    """

    size: int
    first_id: int
    largest: int
    group: ProcessGroup | None
    waiting: list[tuple[Tensor, list[Tensor]]] = field(default_factory=list)

    @classmethod
    def whole(cls, size: int) -> Vocabulary:
        """All of it in one process."""
        return cls(size, 0, size, None)

    def gather(self, values: Tensor) -> Tensor:
        """Every shard's ``values`` in rank order, ``[shards, *values.shape]``: one exchange, with all that waits."""
        # Rows are the same on all ranks: where there are none, nobody waits.
        if self.group is None or not values.numel():
            return values.unsqueeze(0)
        arrived: list[Tensor] = []
        sent = [*self.waiting, (values, arrived)]
        self.waiting.clear()
        gathered = gather_ranks(torch.cat([part.flatten() for part, _ in sent]), self.group)
        for (part, goal), received in zip(sent, gathered.split([part.numel() for part, _ in sent], dim=1), strict=True):
            goal.append(received.view(-1, *part.shape))
        return arrived.pop()

    def gather_later(self, values: Tensor) -> Callable[[], Tensor]:
        """``gather`` within the next exchange: call what is returned after it, once."""
        arrived: list[Tensor] = []
        self.waiting.append((values, arrived))
        return arrived.pop

    def combine(self, parts: list[ModelSums], slope: float) -> list[ModelSums]:
        """The sums of whole rows, of one or both models, from this shard's."""
        if self.group is None:
            return parts
        return merge(ModelSums.unpack(self.gather(ModelSums.pack(parts))), slope)

    def add_up_(self, partial: Tensor | None, rows: Tensor) -> None:
        """Put the sum over all shards in the place of the ``rows`` of ``partial`` ``[N, H]``; others are 0 in all."""
        if self.group is None or partial is None or not len(rows):
            return
        if len(rows) == len(partial):
            sum_ranks_(partial, self.group)
            return
        values = partial[rows]
        sum_ranks_(values, self.group)
        partial[rows] = values


def agree(call: LossArguments | StatsArguments, options: LossOptions | StatsOptions, needs: Needs) -> Vocabulary:
    """The vocabulary of a call, after an exchange with the ranks that hold the rest of it.

    Raises ValueError on every rank when one of them has refused its arguments, or has others than the rest.
    """
    if options.vocab_parallel_group is None:
        return Vocabulary.whole(len(call.weight))
    group = group_of(options.vocab_parallel_group)
    replicated = _replicated(call, options, needs)
    rows = gather_numbers([0, len(call.weight), zlib.crc32(replicated.encode())], group)
    failed, sizes, prints = zip(*rows, strict=True)
    if any(failed):
        ranks = [rank for rank, refused in enumerate(failed) if refused]
        raise ValueError(f"ranks {ranks} of vocab_parallel_group have refused their arguments: their errors say why")
    if len(set(prints)) > 1:
        raise ValueError(
            "all ranks of vocab_parallel_group must be called with the same arguments, but for the sizes of their "
            f"shards: those of ranks {[r for r, p in enumerate(prints) if p != prints[0]]} differ from rank 0's; "
            f"this rank was called with {replicated}"
        )
    starts = list(accumulate(sizes, initial=0))
    return Vocabulary(starts[-1], starts[group.rank()], max(sizes), group)


def name_of(group: ProcessGroup | None) -> str | None:
    """What an operator is told of a group."""
    return None if group is None else group.group_name


def refused_together(group: ProcessGroup | None) -> AbstractContextManager[None]:
    """Checks of a call's arguments: an error of this rank alone is one of every rank, where ``agree`` raises it.

    A compiler traces the checks on each rank alone, before anything runs.
    """
    return nullcontext() if group is None or torch.compiler.is_compiling() else _announcing(group)


@contextmanager
def _announcing(group: ProcessGroup) -> Iterator[None]:
    try:
        yield
    except Exception:
        gather_numbers([1, 0, 0], group)
        raise


def _replicated(call: LossArguments | StatsArguments, options: LossOptions | StatsOptions, needs: Needs) -> str:
    """What has to be the same on all ranks, in words."""
    tensors = [
        f"{name} {str(x.dtype).removeprefix('torch.')}{list(x.shape[name in _SHARDED :])} on {x.device.type}"
        for name, x in call._asdict().items()
        if isinstance(x, Tensor)
    ]
    wanted = [name for name, need in needs._asdict().items() if need]
    # Each rank has its own peers in another group.
    common = {name: x is not None if name.endswith("_group") else x for name, x in options._asdict().items()}
    return f"{', '.join(tensors)}; {common}; gradients of {wanted}"
