"""Which tokens of padded rows are in a loss, and the hidden states that predict them."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

T = TypeVar("T")

IGNORED = -100


class Responses(NamedTuple):
    """The N tokens of a batch ``[B, S]`` that are in a loss, row by row.

    ``mask``: ``[B, S]``, bool; ``target_ids`` and ``rows``: ``[N]``, the tokens and the sequence of each; ``before``:
    ``[N]``, the column of the token before it, which may be any number of padding away.
    """

    mask: Tensor
    target_ids: Tensor
    rows: Tensor
    before: Tensor

    def hidden(self, hidden: Tensor) -> Tensor:
        """The states ``[N, H]`` that predict the tokens, of ``[B, P + S, H]`` behind P virtual tokens."""
        return hidden[self.rows, self.before + hidden.shape[1] - self.mask.shape[1]]

    def pack(self, name: str, values: Tensor | None) -> Tensor | None:
        """The values of the N tokens, of ``[B]``, ``[B, 1]`` or ``[B, S, ...]``."""
        if values is None:
            return None
        batch, length = self.mask.shape
        if not isinstance(values, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(values).__name__}")
        if values.shape[:1] != (batch,) or (values.ndim > 1 and values.shape[1] not in (1, length)):
            raise ValueError(
                f"{name} must have shape [B], [B, 1] or that of input_ids, [{batch}, {length}], got "
                f"{list(values.shape)}"
            )
        if values.ndim == 1 or values.shape[1] == 1:
            return values.reshape(batch)[self.rows]
        return values[self.mask]

    def unpack(self, values: Tensor) -> Tensor:
        """``[N]`` as ``[B, S]``, 0 at other tokens."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)


def on_device(values: T, device: torch.device) -> T:
    """Tensors, alone or in tuples and dicts, on a device: a model may have its parts on several."""
    moved: Any = tree_map_only(Tensor, lambda x: x.to(device), values)
    result: T = moved
    return result


def find_responses(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    response_mask: Tensor | None,
    labels: Tensor | None,
    prefix: str = "",
) -> Responses:
    """The tokens that ``response_mask`` or ``labels`` says; ``prefix`` is that of the arguments' names.

    Raises TypeError or ValueError for other dtypes and shapes, for both or none of the two, and for a token that is
    padding or has no token before it in its row.
    """
    ids_name, mask_name = f"{prefix}input_ids", f"{prefix}response_mask"
    _check(ids_name, input_ids, None)
    if attention_mask is None:
        attended = torch.ones_like(input_ids, dtype=torch.bool)
    else:
        _check(f"{prefix}attention_mask", attention_mask, input_ids)
        attended = attention_mask.bool()
    if (response_mask is None) == (labels is None):
        given = "none" if labels is None else "both"
        raise ValueError(f"{mask_name} or {prefix}labels is required, got {given} of them")
    if labels is not None:
        mask_name = f"{prefix}labels"
        _check(mask_name, labels, input_ids)
        mask, targets = labels != IGNORED, labels
    else:
        _check(mask_name, response_mask, input_ids)
        assert response_mask is not None
        mask, targets = response_mask.bool(), input_ids
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    latest = torch.where(attended, columns, -1).cummax(1).values
    before = torch.cat([latest.new_full((len(latest), 1), -1), latest[:, :-1]], 1)
    wrong = mask & (~attended | (before < 0))
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        what = "has no token before it in its row" if attended[row, column] else "is padding in attention_mask"
        off = "False" if labels is None else str(IGNORED)
        raise ValueError(f"{mask_name} must be {off} at [{row}, {column}], which {what}")
    return Responses(mask, targets[mask], mask.nonzero()[:, 0], before[mask])


def _check(name: str, values: object, like: Tensor | None) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(values).__name__}")
    if values.is_floating_point():
        raise TypeError(f"{name} must be integers or bools, got {values.dtype}")
    if like is None and values.ndim != 2:
        raise ValueError(f"{name} must have shape [B, S], got {list(values.shape)}")
    if like is not None and values.shape != like.shape:
        raise ValueError(f"{name} must have the shape of input_ids, {list(like.shape)}, got {list(values.shape)}")
