"""A divergence whose entries are bounded, or whose numbers are each row's own, and the entries of its gradient."""

import triton
import triton.language as tl

from srpo_kernels.kernels.primitives import VECTOR, block_columns, load_units, log2

# Of a row: the units at which log p and log q are 0, and what ``entry`` reads.
ENTRY_NUMBERS = tl.constexpr(12)


@triton.jit
def row_entries_kernel(
    z_ptr,
    y_ptr,
    numbers_ptr,
    sums_ptr,
    z_stride_row,
    y_stride_row,
    vocab_size,
    inner,
    slope2,
    SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    VENDOR: tl.constexpr,
):
    """Write the sums of ``entry``'s g and f, side by side. Every logit is read once; vocabulary slices add up."""
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * z_stride_row
    y_row = y_ptr + row * y_stride_row
    numbers = load_numbers(numbers_ptr + row * ENTRY_NUMBERS)
    columns = block_columns(LANES)
    BLOCK: tl.constexpr = LANES * VECTOR
    whole = vocab_size // BLOCK * BLOCK

    f_sum = tl.zeros([LANES], tl.float32)
    g_sum = tl.zeros([LANES], tl.float32)
    for start in range(0, whole, BLOCK):
        z = load_units(z_row + start, columns, BLOCK, inner, SOFTCAP, VENDOR, False)
        y = load_units(y_row + start, columns, BLOCK, inner, TEACHER_SOFTCAP, VENDOR, False)
        f, g = entry(z, y, numbers, slope2, VENDOR)
        f_sum += tl.sum(f, axis=1)
        g_sum += tl.sum(g, axis=1)
    if whole < vocab_size:
        z = load_units(z_row + whole, columns, vocab_size - whole, inner, SOFTCAP, VENDOR, True)
        y = load_units(y_row + whole, columns, vocab_size - whole, inner, TEACHER_SOFTCAP, VENDOR, True)
        f, g = entry(z, y, numbers, slope2, VENDOR)
        f_sum += tl.sum(f, axis=1)
        g_sum += tl.sum(g, axis=1)
    tl.store(sums_ptr + row * 2, tl.sum(g_sum))
    tl.store(sums_ptr + row * 2 + 1, tl.sum(f_sum))


@triton.jit
def load_numbers(own):
    """What ``entry`` reads of a row."""
    return (
        tl.load(own), tl.load(own + 1), tl.load(own + 2), tl.load(own + 3), tl.load(own + 4), tl.load(own + 5),
        tl.load(own + 6), tl.load(own + 7), tl.load(own + 8), tl.load(own + 9), tl.load(own + 10), tl.load(own + 11),
    )  # fmt: skip


@triton.jit
def entry(z, y, numbers, slope2, VENDOR: tl.constexpr):
    """``min(f, clip)``, and g where f is below the clip, both from units of the logits.

    Of the model that has the larger share in m, the major one, and the minor one: ``gap`` is the logarithm of their
    ratio, and m is ``share major (1 + 2^d)``. ``f`` and ``g`` are sums of ``major log(major / m)``,
    ``minor log(minor / m)`` and, in g, ``minor major / m``.
    """
    (
        z_own, y_own, of_student, shift, log2_share, log2_ratio, f_major, f_minor, g_major, g_minor, overlap, clip,
    ) = numbers  # fmt: skip
    log2_p, log2_q = (z - z_own) * slope2, (y - y_own) * slope2
    major = tl.where(of_student > 0.0, log2_p, log2_q)
    minor = tl.where(of_student > 0.0, log2_q, log2_p)
    gap = (minor - major) + shift
    d = gap + log2_ratio
    rest = log2_share + log2(1.0 + tl.exp2(-tl.abs(d)), VENDOR)
    major_ratio = tl.minimum(-d, 0.0) - rest
    minor_ratio = tl.minimum(gap, -log2_ratio) - rest
    # A NaN is lost in a minimum, and comes back with a probability.
    major_term = tl.exp2(major) * major_ratio
    minor_term = tl.exp2(minor) * minor_ratio
    f = f_major * major_term + f_minor * minor_term
    g = g_major * major_term + g_minor * minor_term + overlap * tl.exp2(minor + major_ratio)
    outside = f >= clip
    return tl.where(outside, clip, f), tl.where(outside, 0.0, g)
