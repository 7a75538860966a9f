"""``pad_support``: lists of tokens as the padded ids that the losses take."""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_kernels.checks import INTEGER, require_shape, require_tensor


def pad_support(ids: Tensor, offsets: Tensor) -> Tensor:
    """The tokens that rows were sampled from, one list after another (CSR), as ``support_ids``.

    Row n has ``ids[offsets[n] : offsets[n + 1]]``, and -1 behind them. One transfer to the host.

    Args:
        ids: ``[M]``, integers, none negative: the lists of all rows.
        offsets: ``[N + 1]``, integers: where in ``ids`` each list begins, and where the last one ends; from 0 to M.

    Returns:
        ``[N, S]``, int64, S the length of the longest list, 1 at least; ``.view(B, T, -1)`` for padded batches.

    Raises:
        TypeError: no tensors of integers.
        ValueError: another shape or device, offsets that do not lead from 0 to M, or a negative id.
    """
    ids = require_tensor("ids", ids, INTEGER)
    offsets = require_tensor("offsets", offsets, INTEGER, ids.device)
    if ids.ndim != 1:
        raise ValueError(f"ids must have shape [M], got {list(ids.shape)}")
    require_shape("offsets", offsets, [(max(offsets.numel(), 1),)], "[N + 1], where lists begin and the last one ends")
    ids, offsets = ids.long(), offsets.long()
    lengths = offsets.diff()
    nothing = lengths.new_zeros(1)
    shortest, longest = torch.cat([lengths, nothing]).aminmax()
    lowest = torch.cat([ids, nothing]).amin()
    first, last, least, width, negative = torch.stack([offsets[0], offsets[-1], shortest, longest, lowest]).tolist()
    if first or last != len(ids) or least < 0:
        raise ValueError(
            f"offsets must lead from 0 to the {len(ids)} ids and never back, got {first} to {last}"
            + (f", and back by {-least}" if least < 0 else "")
        )
    if negative < 0:
        raise ValueError(f"ids must not be negative: shorter lists are padded here, got {negative}")
    padded = ids.new_full((len(lengths), max(width, 1)), -1)
    rows = torch.arange(len(lengths), device=ids.device).repeat_interleave(lengths, output_size=len(ids))
    padded[rows, torch.arange(len(ids), device=ids.device) - offsets[rows]] = ids
    return padded
