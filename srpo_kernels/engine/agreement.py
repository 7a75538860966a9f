"""How the ranks that hold one vocabulary in shards open a call: who has which shard, and whether one refuses it.

They find out in one small exchange that opens every call. It is not remembered: two heads may have shards of one size
on this rank and of two on another, so that only some ranks would have to ask again, and those would wait for the
others.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from srpo_kernels.distributed import gather_numbers, group_of
from srpo_kernels.engine.arguments import LossArguments, LossOptions, StatsArguments, StatsOptions
from srpo_kernels.engine.batch import Needs
from srpo_kernels.rows.vocabulary import Vocabulary

# The arguments whose first dimension is the vocabulary: a rank's own. All others are the same on all ranks.
_SHARDED = ("weight", "bias", "teacher_weight", "teacher_bias", "teacher_weights", "teacher_biases")


def agree(call: LossArguments | StatsArguments, options: LossOptions | StatsOptions, needs: Needs) -> Vocabulary:
    """The vocabulary of a call, after an exchange with the ranks that hold the rest of it.

    Raises ValueError on every rank when one of them has refused its arguments, or has others than the rest.
    """
    if options.vocab_parallel_group is None:
        return Vocabulary.whole(len(call.weight))
    group = group_of(options.vocab_parallel_group)
    replicated = _replicated(call, options, needs)
    rows = gather_numbers([0, len(call.weight), zlib.crc32(replicated.encode())], group, call.weight)
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
    return Vocabulary(starts[-1], starts[group.rank()], sizes[group.rank()], max(sizes), group)


def name_of(group: ProcessGroup | None) -> str | None:
    """What an operator is told of a group."""
    return None if group is None else group.group_name


def refused_together(group: ProcessGroup | None, weight: object) -> AbstractContextManager[None]:
    """Checks of a call's arguments: an error of this rank alone is one of every rank, where ``agree`` raises it.

    ``weight`` is the argument as it came. A compiler traces the checks on each rank alone, before anything runs.
    """
    return nullcontext() if group is None or torch.compiler.is_compiling() else _announcing(group, weight)


@contextmanager
def _announcing(group: ProcessGroup, weight: object) -> Iterator[None]:
    try:
        yield
    except Exception:
        gather_numbers([1, 0, 0], group, weight)
        raise


def _replicated(call: LossArguments | StatsArguments, options: LossOptions | StatsOptions, needs: Needs) -> str:
    """What has to be the same on all ranks, in words."""
    named: dict[str, Any] = call._asdict()
    if isinstance(options, LossOptions):
        named |= dict(zip(options.input_names, named.pop("inputs"), strict=True))
    tensors = [
        f"{name} {str(x.dtype).removeprefix('torch.')}{list(x.shape[name in _SHARDED :])} on {x.device.type}"
        for name, value in named.items()
        for x in (value if isinstance(value, list) else [value])
        if isinstance(x, Tensor)
    ]
    wanted = [name for name, need in needs._asdict().items() if need]
    # Each rank has its own peers in another group, and its own address of a function.
    common = {name: x is not None if name.endswith("_group") else x for name, x in options._asdict().items()}
    if callable(function := common.get("objective")):
        common["objective"] = getattr(function, "__qualname__", type(function).__name__)
    return f"{', '.join(tensors)}; {common}; gradients of {wanted}"
