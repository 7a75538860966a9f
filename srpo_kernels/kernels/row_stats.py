"""One pass over a row of logits, or over a student's and a teacher's together: mergeable sums."""

import triton
import triton.language as tl

from srpo_kernels.kernels.primitives import LOWEST, VECTOR, block_columns, load_units, to_units


@triton.jit
def row_stats_kernel(
    z_ptr,
    y_ptr,
    target_ids_ptr,
    sums_ptr,
    z_stride_row,
    y_stride_row,
    vocab_size,
    inner,
    slope2,
    TEACHER: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    VENDOR: tl.constexpr,
):
    """Write a row's ``ModelSums`` of the student z; with a teacher y those of both, 6 numbers and 5.

    Without ``TEACHER_SOFTCAP`` y is in units already. Every logit is read once. The running sums belong to lanes, which
    meet after the loop.
    """
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * z_stride_row
    y_row = y_ptr + row * y_stride_row
    columns = block_columns(LANES)
    BLOCK: tl.constexpr = LANES * VECTOR
    whole = vocab_size // BLOCK * BLOCK

    zeros = tl.zeros([LANES], tl.float32)
    z_max = zeros + LOWEST
    z_total, z_weighted, z_gap, z_anchor = zeros, zeros, zeros, z_max
    y_max, y_total, y_weighted, y_gap = z_max, zeros, zeros, zeros
    # Whole blocks without a mask, then one with: a mask would narrow the loads of every block to 4 bytes.
    for start in range(0, whole, BLOCK):
        # Tokens that are taken out of a row are marked in it: of a model alone.
        z = to_units(tl.load(z_row + start + columns), inner, SOFTCAP, VENDOR, not TEACHER)
        if TEACHER:
            y = load_units(y_row + start, columns, BLOCK, inner, TEACHER_SOFTCAP, VENDOR, False)
            z_max, z_total, z_weighted, z_gap, z_anchor, y_max, y_total, y_weighted, y_gap = _add_pair(
                z_max, z_total, z_weighted, z_gap, z_anchor, y_max, y_total, y_weighted, y_gap, z, y, slope2
            )
        else:
            z_max, z_total, z_weighted = _add(z_max, z_total, z_weighted, z, slope2)
    if whole < vocab_size:
        z = load_units(z_row + whole, columns, vocab_size - whole, inner, SOFTCAP, VENDOR, True)
        if TEACHER:
            y = load_units(y_row + whole, columns, vocab_size - whole, inner, TEACHER_SOFTCAP, VENDOR, True)
            z_max, z_total, z_weighted, z_gap, z_anchor, y_max, y_total, y_weighted, y_gap = _add_pair(
                z_max, z_total, z_weighted, z_gap, z_anchor, y_max, y_total, y_weighted, y_gap, z, y, slope2
            )
        else:
            z_max, z_total, z_weighted = _add(z_max, z_total, z_weighted, z, slope2)

    # A target outside of this slice of the vocabulary is another slice's.
    target_id = tl.load(target_ids_ptr + row)
    here = (target_id >= 0) & (target_id < vocab_size)
    target = to_units(tl.load(z_row + target_id, mask=here, other=LOWEST), inner, SOFTCAP, VENDOR, True)
    z_shift = z_max - tl.max(z_max)
    if TEACHER:
        own = sums_ptr + row * 11
        y_shift = y_max - tl.max(y_max)
        row_anchor = anchor_of_row(z_shift, z_anchor)
        z_gap_shift = z_shift - (z_anchor - row_anchor)
        store_sums(own, z_max, z_total, z_weighted, z_gap, z_shift, z_gap_shift, target, slope2)
        tl.store(own + 5, row_anchor)
        y_raw = tl.load(y_row + target_id, mask=here, other=LOWEST)
        y_target = to_units(y_raw, inner, TEACHER_SOFTCAP, VENDOR, True)
        store_sums(own + 6, y_max, y_total, y_weighted, y_gap, y_shift, z_shift - y_shift, y_target, slope2)
    else:
        store_sums(sums_ptr + row * 5, z_max, z_total, z_weighted, z_gap, z_shift, z_shift, target, slope2)


@triton.jit
def _add(maximum, total, weighted, x, slope2):
    """Add a block ``[LANES, VECTOR]`` of units to the lanes' sums."""
    new_maximum = tl.maximum(maximum, tl.max(x, axis=1))
    shift = maximum - new_maximum
    decay = tl.exp2(shift * slope2)
    # Relative to the maximum, whose own share is then exact: most rows have hardly anything else.
    x -= new_maximum[:, None]
    e = tl.exp2(x * slope2)
    weighted = (weighted + shift * total) * decay + tl.sum(e * x, axis=1)
    return new_maximum, total * decay + tl.sum(e, axis=1), weighted


@triton.jit
def _add_pair(z_max, z_total, z_weighted, z_gap, z_anchor, y_max, y_total, y_weighted, y_gap, z, y, slope2):
    """Add a block of both models, and the difference between them.

    The student's sum of it is relative to the student's maximum and the teacher's unit there, the ``anchor``: exactly
    0 for a row that has one token alone. The teacher's is relative to both maxima.
    """
    z_new_max, y_new_max = tl.maximum(z_max, tl.max(z, axis=1)), tl.maximum(y_max, tl.max(y, axis=1))
    there = tl.max(tl.where(z == z_new_max[:, None], y, LOWEST), axis=1)
    z_new_anchor = tl.where(tl.max(z, axis=1) >= z_max, there, z_anchor)
    z_shift, y_shift = z_max - z_new_max, y_max - y_new_max
    z_decay, y_decay = tl.exp2(z_shift * slope2), tl.exp2(y_shift * slope2)
    z -= z_new_max[:, None]
    z_gaps = z - (y - z_new_anchor[:, None])
    y -= y_new_max[:, None]
    z_e, y_e = tl.exp2(z * slope2), tl.exp2(y * slope2)
    z_weighted = (z_weighted + z_shift * z_total) * z_decay + tl.sum(z_e * z, axis=1)
    y_weighted = (y_weighted + y_shift * y_total) * y_decay + tl.sum(y_e * y, axis=1)
    z_gap_shift = z_shift - (z_anchor - z_new_anchor)
    z_gap = (z_gap + z_gap_shift * z_total) * z_decay + tl.sum(z_e * z_gaps, axis=1)
    y_gap = (y_gap + (z_shift - y_shift) * y_total) * y_decay + tl.sum(y_e * (z - y), axis=1)
    z_total = z_total * z_decay + tl.sum(z_e, axis=1)
    y_total = y_total * y_decay + tl.sum(y_e, axis=1)
    return z_new_max, z_total, z_weighted, z_gap, z_new_anchor, y_new_max, y_total, y_weighted, y_gap


@triton.jit
def anchor_of_row(shift, anchor):
    """The anchor of the part that has the row's maximum: whose ``shift`` from it is 0."""
    return tl.max(tl.where(shift == 0.0, anchor, LOWEST))


@triton.jit
def store_sums(out, maximum, total, weighted, gap, shift, gap_shift, target, slope2):
    """Merge the lanes' sums and write maximum, total, weighted, gap and target; shifts are from the row's maxima."""
    decay = tl.exp2(shift * slope2)
    tl.store(out, tl.max(maximum))
    tl.store(out + 1, tl.sum(total * decay))
    tl.store(out + 2, tl.sum((weighted + shift * total) * decay))
    tl.store(out + 3, tl.sum((gap + gap_shift * total) * decay))
    tl.store(out + 4, target)
