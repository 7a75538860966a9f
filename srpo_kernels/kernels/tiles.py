"""Statistics straight from hidden states: no logits, no gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from srpo_kernels.kernels.launch import INTERPRETED, merge_launch, on_device, tile_launch, vendor_of
from srpo_kernels.kernels.tile_stats import merge_tiles_kernel, tile_stats_kernel
from srpo_kernels.kernels.transform import Transform
from srpo_kernels.rows.contract import Statistics
from srpo_kernels.rows.spec import RowSpec
from srpo_kernels.rows.sums import Combine, pair_statistics, row_statistics, unpack

# Bytes of the sums of all tiles that one launch may write.
_MOST_SUMS = 64 << 20


class Projection(NamedTuple):
    """A model's rows: ``hidden`` ``[n, H]``, ``weight`` ``[V, H]`` of the same dtype, ``bias`` ``[V]``."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def tile_stats(
    student: Projection,
    teacher: Projection | None,
    spec: RowSpec,
    target_ids: Tensor,
    combine: Combine = lambda parts, slope: parts,
) -> Statistics:
    """Log-probs, entropies and, with a teacher, the divergence, which must not be one from a mixture.

    Such a one takes a second look at the logits.

    A row's tiles and the order in which they are summed do not depend on the other rows: its results are the same to
    the last bit in any batch. Where the weights are a slice of the vocabulary, ids are relative to its first one and
    ``combine`` adds the other slices' sums.
    """
    transform = Transform.of(spec.transform)
    parts = [student] if teacher is None else [student, teacher]
    num_rows, vocab_size = len(student.hidden), len(student.weight)
    device, dtype = student.hidden.device, student.hidden.dtype
    capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    vendor = vendor_of(device)
    launch, merge = tile_launch(len(parts), dtype, vendor, capability), merge_launch(vendor)
    tiles = triton.cdiv(vocab_size, launch.block_vocab)
    # ModelSums of one model, or of two side by side.
    fields = 5 if teacher is None else 11
    height = max(launch.block_rows, _MOST_SUMS // (tiles * 4 * fields))

    hidden = [part.hidden.contiguous() for part in parts]
    # Rows of 16-byte multiples come from a contiguous weight; a transposed one would be read element by element.
    weights = [part.weight if part.weight.stride(1) == 1 else part.weight.contiguous() for part in parts]
    with_bias = any(part.bias is not None for part in parts)
    biases = [part.bias for part in parts]
    if with_bias:
        biases = [torch.zeros_like(part.weight[:, 0]) if part.bias is None else part.bias for part in parts]
    merged = torch.empty(num_rows, fields, dtype=torch.float32, device=device)
    for start in range(0, num_rows, height):
        rows = slice(start, min(start + height, num_rows))
        count = rows.stop - rows.start
        states = [x[rows] for x in hidden]
        sums = merged.new_empty(count, tiles, fields)
        with on_device(sums):
            tile_stats_kernel[(triton.cdiv(count, launch.block_rows), tiles)](
                states[0], weights[0], biases[0], states[-1], weights[-1], biases[-1], target_ids[rows], sums,
                count, vocab_size, states[0].shape[1], states[-1].shape[1],
                states[0].stride(0), weights[0].stride(0), states[-1].stride(0), weights[-1].stride(0),
                transform.inner, transform.slope2,
                TEACHER=teacher is not None,
                BIAS=with_bias,
                SOFTCAP=transform.softcap,
                VENDOR=vendor,
                # The interpreter multiplies the bits of bf16.
                WIDEN=INTERPRETED and dtype == torch.bfloat16,
                BLOCK_ROWS=launch.block_rows,
                BLOCK_VOCAB=launch.block_vocab,
                BLOCK_HIDDEN=launch.block_hidden,
                **launch.options,
            )  # fmt: skip
            merge_tiles_kernel[(count,)](
                sums,
                merged[rows],
                tiles,
                transform.slope2,
                TEACHER=teacher is not None,
                BLOCK_TILES=merge.lanes,
                **merge.options,
            )
    models = combine(unpack(merged), transform.slope)
    if teacher is None:
        return row_statistics(models[0], transform.slope, entropy=True)
    return pair_statistics(models[0], models[1], spec, transform.slope, entropy=True)
