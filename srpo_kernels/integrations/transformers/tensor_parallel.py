"""LM heads that tensor parallelism has in shards of the vocabulary, which stay there."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate, Shard

from srpo_kernels.integrations.transformers.head import Head
from srpo_kernels.integrations.transformers.shards import is_tensor_parallel, to_part


def shard_of(head: Head) -> tuple[Head, ProcessGroup | None]:
    """What this rank multiplies, and the ``vocab_parallel_group`` whose ranks have the other rows of the head.

    Gradients reach the shard; that of ``hidden`` is whole on each rank. Raises ValueError for shards of columns.
    """
    weight, bias = head.weight, head.bias
    if not is_tensor_parallel(weight):
        return head, None
    (placement,) = weight.placements
    if placement not in (Shard(0), Replicate()):
        raise ValueError(
            "model must have its LM head whole or in shards of its rows, the vocabulary, with tensor parallelism, got "
            f"{placement}: tp_plan={{'lm_head': 'colwise_gather_output'}} in its distributed_config makes them"
        )
    own = Head(head.hidden, weight.to_local(), bias.to_local() if isinstance(bias, DTensor) else bias)
    return own, None if placement == Replicate() else weight.device_mesh.get_group()


def columns_of_all(products: Tensor, weight: Tensor) -> Tensor:
    """``[..., V]`` on every rank, of the products ``[..., V_r]`` with its shard of the weight."""
    if not is_tensor_parallel(weight):
        return products
    placements = [Shard(products.ndim - 1) if weight.placements == (Shard(0),) else Replicate()]
    whole = torch.empty((*products.shape[:-1], len(weight)), device="meta")
    columns = DTensor.from_local(products, weight.device_mesh, placements, shape=whole.shape, stride=whole.stride())
    return columns.full_tensor()


def rows_of(value: Tensor, like: Tensor) -> Tensor:
    """This rank's rows of a head's detached weight or bias, where it has the rows that it has of ``like``."""
    if isinstance(value, DTensor):
        return value.to_local()
    return to_part(like, value) if isinstance(like, DTensor) else value
