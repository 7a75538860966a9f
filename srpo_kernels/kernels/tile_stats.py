"""Projection and reductions in one kernel: the statistics of hidden states without a logit in memory."""

import triton
import triton.language as tl

from srpo_kernels.kernels.primitives import LOWEST, to_units
from srpo_kernels.kernels.row_stats import anchor_of_row, store_sums


@triton.jit
def tile_stats_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    teacher_hidden_ptr,
    teacher_weight_ptr,
    teacher_bias_ptr,
    target_ids_ptr,
    sums_ptr,
    num_rows,
    vocab_size,
    hidden_size,
    teacher_hidden_size,
    hidden_stride_row,
    weight_stride_row,
    teacher_hidden_stride_row,
    teacher_weight_stride_row,
    inner,
    slope2,
    TEACHER: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    VENDOR: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """Write the ``ModelSums`` of a group of rows over one tile of the vocabulary.

    They are ``[rows, tiles, 5]``, or with a teacher ``[rows, tiles, 6 + 5]``. Row groups are the fast axis of the grid:
    programs that run together share a tile of the weight, which therefore streams through the cache once, while the
    hidden states stay there.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tile = tl.program_id(1)
    ids = tile * BLOCK_VOCAB + tl.arange(0, BLOCK_VOCAB)
    row_in_range, id_in_range = rows < num_rows, ids < vocab_size
    z = _logits(
        hidden_ptr, weight_ptr, bias_ptr, rows, ids, row_in_range, id_in_range, hidden_size, hidden_stride_row,
        weight_stride_row, BIAS, WIDEN, BLOCK_ROWS, BLOCK_VOCAB, BLOCK_HIDDEN,
    )  # fmt: skip
    z = tl.where(id_in_range[None, :], to_units(z, inner, SOFTCAP, VENDOR, False), LOWEST)
    target_ids = tl.load(target_ids_ptr + rows, mask=row_in_range, other=-1)
    target = tl.max(tl.where(ids[None, :] == target_ids[:, None], z, LOWEST), axis=1)

    FIELDS: tl.constexpr = 11 if TEACHER else 5
    out = sums_ptr + (rows.to(tl.int64) * tl.num_programs(1) + tile) * FIELDS
    z_max = tl.max(z, axis=1)
    if TEACHER:
        y = _logits(
            teacher_hidden_ptr, teacher_weight_ptr, teacher_bias_ptr, rows, ids, row_in_range, id_in_range,
            teacher_hidden_size, teacher_hidden_stride_row, teacher_weight_stride_row, BIAS, WIDEN, BLOCK_ROWS,
            BLOCK_VOCAB, BLOCK_HIDDEN,
        )  # fmt: skip
        y = tl.where(id_in_range[None, :], to_units(y, inner, SOFTCAP, VENDOR, False), LOWEST)
        y_max = tl.max(y, axis=1)
        z_anchor = tl.max(tl.where(z == z_max[:, None], y, LOWEST), axis=1)
        z -= z_max[:, None]
        _reduce(out, z_max, z, z - (y - z_anchor[:, None]), target, slope2, row_in_range)
        tl.store(out + 5, z_anchor, mask=row_in_range)
        y -= y_max[:, None]
        _reduce(out + 6, y_max, y, z - y, target, slope2, row_in_range)
    else:
        z -= z_max[:, None]
        _reduce(out, z_max, z, z, target, slope2, row_in_range)


@triton.jit
def _logits(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    rows,
    ids,
    row_in_range,
    id_in_range,
    hidden_size,
    hidden_stride_row,
    weight_stride_row,
    BIAS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """``hidden @ weight.T + bias`` of a tile, ``[BLOCK_ROWS, BLOCK_VOCAB]`` in fp32."""
    channels = tl.arange(0, BLOCK_HIDDEN)
    hidden_rows = hidden_ptr + rows.to(tl.int64)[:, None] * hidden_stride_row + channels[None, :]
    weight_rows = weight_ptr + ids.to(tl.int64)[None, :] * weight_stride_row + channels[:, None]
    logits = tl.zeros([BLOCK_ROWS, BLOCK_VOCAB], tl.float32)
    for start in range(0, hidden_size, BLOCK_HIDDEN):
        channel_in_range = channels < hidden_size - start
        x = tl.load(hidden_rows + start, mask=row_in_range[:, None] & channel_in_range[None, :], other=0.0)
        w = tl.load(weight_rows + start, mask=id_in_range[None, :] & channel_in_range[:, None], other=0.0)
        if WIDEN:
            x, w = x.to(tl.float32), w.to(tl.float32)
        logits = tl.dot(x, w, logits, input_precision="ieee")
    if BIAS:
        logits += tl.load(bias_ptr + ids, mask=id_in_range, other=0.0).to(tl.float32)[None, :]
    return logits


@triton.jit
def _reduce(out, maximum, x, gap, target, slope2, row_in_range):
    """Write the sums of each row of a tile of units, which are relative to the row's maximum."""
    e = tl.exp2(x * slope2)
    tl.store(out, maximum, mask=row_in_range)
    tl.store(out + 1, tl.sum(e, axis=1), mask=row_in_range)
    tl.store(out + 2, tl.sum(e * x, axis=1), mask=row_in_range)
    tl.store(out + 3, tl.sum(e * gap, axis=1), mask=row_in_range)
    tl.store(out + 4, target, mask=row_in_range)


@triton.jit
def merge_tiles_kernel(sums_ptr, merged_ptr, tiles, slope2, TEACHER: tl.constexpr, BLOCK_TILES: tl.constexpr):
    """Merge the sums of a row's tiles, in an order that no other row has a part in."""
    row = tl.program_id(0).to(tl.int64)
    FIELDS: tl.constexpr = 11 if TEACHER else 5
    merged = merged_ptr + row * FIELDS
    zeros = tl.zeros([BLOCK_TILES], tl.float32)
    lowest = zeros + LOWEST
    z_max, z_total, z_weighted, z_gap, z_anchor, target = lowest, zeros, zeros, zeros, lowest, lowest
    y_max, y_total, y_weighted, y_gap = lowest, zeros, zeros, zeros
    # The running sums belong to lanes, which meet after the loop.
    for start in range(0, tiles, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)
        in_range = tile < tiles
        own = sums_ptr + (row * tiles + tile) * FIELDS
        z_new = tl.load(own, mask=in_range, other=LOWEST)
        z_new_max = tl.maximum(z_max, z_new)
        z_shift, z_new_shift = z_max - z_new_max, z_new - z_new_max
        z_gap_shift, z_new_gap_shift = z_shift, z_new_shift
        if TEACHER:
            new_anchor = tl.load(own + 5, mask=in_range, other=LOWEST)
            z_new_anchor = tl.maximum(
                tl.where(z_shift == 0.0, z_anchor, LOWEST), tl.where(z_new_shift == 0.0, new_anchor, LOWEST)
            )
            y_new = tl.load(own + 6, mask=in_range, other=LOWEST)
            y_new_max = tl.maximum(y_max, y_new)
            y_shift, y_new_shift = y_max - y_new_max, y_new - y_new_max
            y_total, y_weighted, y_gap = _merge(
                own + 6, in_range, y_total, y_weighted, y_gap, y_shift, z_shift - y_shift, y_new_shift,
                z_new_shift - y_new_shift, slope2,
            )  # fmt: skip
            z_gap_shift = z_shift - (z_anchor - z_new_anchor)
            z_new_gap_shift = z_new_shift - (new_anchor - z_new_anchor)
            z_anchor, y_max = z_new_anchor, y_new_max
        z_total, z_weighted, z_gap = _merge(
            own, in_range, z_total, z_weighted, z_gap, z_shift, z_gap_shift, z_new_shift, z_new_gap_shift, slope2
        )
        z_max = z_new_max
        target = tl.maximum(target, tl.load(own + 4, mask=in_range, other=LOWEST))

    row_target = tl.max(target)
    z_shift = z_max - tl.max(z_max)
    if TEACHER:
        y_shift = y_max - tl.max(y_max)
        row_anchor = anchor_of_row(z_shift, z_anchor)
        z_gap_shift = z_shift - (z_anchor - row_anchor)
        store_sums(merged, z_max, z_total, z_weighted, z_gap, z_shift, z_gap_shift, row_target, slope2)
        tl.store(merged + 5, row_anchor)
        store_sums(merged + 6, y_max, y_total, y_weighted, y_gap, y_shift, z_shift - y_shift, row_target, slope2)
    else:
        store_sums(merged, z_max, z_total, z_weighted, z_gap, z_shift, z_shift, row_target, slope2)


@triton.jit
def _merge(own, in_range, total, weighted, gap, shift, gap_shift, new_shift, new_gap_shift, slope2):
    """Add a model's sums of a tile to those of its lane; shifts are from what both are then relative to."""
    new_total = tl.load(own + 1, mask=in_range, other=0.0)
    new_weighted = tl.load(own + 2, mask=in_range, other=0.0)
    new_gap = tl.load(own + 3, mask=in_range, other=0.0)
    decay, new_decay = tl.exp2(shift * slope2), tl.exp2(new_shift * slope2)
    return (
        total * decay + new_total * new_decay,
        (weighted + shift * total) * decay + (new_weighted + new_shift * new_total) * new_decay,
        (gap + gap_shift * total) * decay + (new_gap + new_gap_shift * new_total) * new_decay,
    )
