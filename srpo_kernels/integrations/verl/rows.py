"""Which hidden states predict the response tokens of a micro-batch in verl's nested form."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class ResponseRows(NamedTuple):
    """The N response tokens of a micro-batch, sequence by sequence, and where the states that predict them are.

    ``sequences``: ``[N]``, the sequence of each in the micro-batch; ``target_ids``: ``[N]``; ``place``: ``[N]``, of the
    token before it among all tokens; ``mine``: ``[N]`` bool, whether this rank has the state, one of Ulysses' ranks
    does; ``own``: ``[n]``, where the states of ``mine`` are among the rank's, ``[B * S, H]``.
    """

    sequences: Tensor
    target_ids: Tensor
    place: Tensor
    mine: Tensor
    own: Tensor

    @classmethod
    def of(cls, input_ids: Any, responses: Any, shape: torch.Size, *, packed: bool, rank: int) -> ResponseRows:
        """The rows of nested ``input_ids`` that end with nested ``responses``.

        ``shape``: of what the model reads: ``[1, S]``, packed, of which rank ``rank`` of Ulysses has the part from
        ``rank * S``; or ``[B, S]``, padded on the right.
        """
        ids, offsets, lengths = input_ids.values(), input_ids.offsets(), responses.offsets().diff()
        sequences = torch.repeat_interleave(torch.arange(len(lengths), device=ids.device), lengths)
        within = torch.arange(len(sequences), device=ids.device) - (lengths.cumsum(0) - lengths)[sequences]
        place = (offsets[1:] - lengths - 1)[sequences] + within
        if packed:
            own = place - rank * shape[1]
            mine = (own >= 0) & (own < shape[1])
            own = own[mine]
        else:
            mine = torch.ones_like(place, dtype=torch.bool)
            own = place - offsets[:-1][sequences] + sequences * shape[1]
        return cls(sequences, ids[place + 1], place, mine, own)

    def gather(self, values: Tensor, group: Any) -> Tensor:
        """``[N, ...]`` of the ``[n, ...]`` that each rank of ``group`` has. Every rank makes the call."""
        whole = values.new_zeros(len(self.mine), *values.shape[1:])
        whole[self.mine] = values
        if group is not None:
            # Zeros elsewhere: exact.
            dist.all_reduce(whole, group=group)
        return whole

    def in_sequences(self, values: Tensor, input_ids: Any) -> Tensor:
        """``[N]`` as verl's engines return it: nested like ``input_ids``, at the token before its own, 0 elsewhere."""
        whole = values.new_zeros(len(input_ids.values()))
        whole[self.place] = values
        return torch.nested.nested_tensor_from_jagged(whole, input_ids.offsets())
