"""Attention over packed rows that Ulysses has cut, without flash-attn: keys and values of all ranks, own queries."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from verl.utils.ulysses import get_ulysses_sequence_parallel_group

NAME = "packed_sp"


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.length = group, values.shape[2]
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, values.contiguous(), group=group)
        return torch.cat(parts, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient.narrow(2, dist.get_rank(ctx.group) * ctx.length, ctx.length), None


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None,
    dropout: float = 0.0, position_ids: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    group, length, first = get_ulysses_sequence_parallel_group(), query.shape[2], 0
    assert position_ids is not None
    if group is not None:
        key, value = _Gather.apply(key, group), _Gather.apply(value, group)
        parts = [torch.empty_like(position_ids) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, position_ids.contiguous(), group=group)
        position_ids, first = torch.cat(parts, -1), dist.get_rank(group) * length
    segments, places = (position_ids[0] == 0).cumsum(0), torch.arange(key.shape[2])
    rows = places[first : first + length]
    mask = (segments[rows][:, None] == segments[None]) & (rows[:, None] >= places[None])
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)
