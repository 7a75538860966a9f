"""The Jensen-Shannon divergence of a row, given both models' log-sum-exps."""

import triton
import triton.language as tl

from srpo_kernels.kernels.primitives import TINY, VECTOR, block_columns, load_units, log2, mixture, reciprocal


@triton.jit
def row_jsd_kernel(
    z_ptr,
    y_ptr,
    coefficients_ptr,
    kl2_ptr,
    z_stride_row,
    y_stride_row,
    vocab_size,
    inner,
    slope2,
    SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    VENDOR: tl.constexpr,
):
    """Write ``KL(p || m)`` and ``KL(q || m)`` of a row, ``[2]`` in bits, for the mixture ``m`` of p and q.

    ``coefficients`` ``[n, 4]``: student's and teacher's log-sum-exp in base 2, their shares in the mixture. Every logit
    is read once; vocabulary slices add up.
    """
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * z_stride_row
    y_row = y_ptr + row * y_stride_row
    own = coefficients_ptr + row * 4
    z_lse2, y_lse2, by_p, by_q = tl.load(own), tl.load(own + 1), tl.load(own + 2), tl.load(own + 3)
    columns = block_columns(LANES)
    BLOCK: tl.constexpr = LANES * VECTOR
    whole = vocab_size // BLOCK * BLOCK

    p_kl = tl.zeros([LANES], tl.float32)
    q_kl = tl.zeros([LANES], tl.float32)
    for start in range(0, whole, BLOCK):
        z = load_units(z_row + start, columns, BLOCK, inner, SOFTCAP, VENDOR, False)
        y = load_units(y_row + start, columns, BLOCK, inner, SOFTCAP, VENDOR, False)
        p_kl, q_kl = _add(p_kl, q_kl, tl.fma(z, slope2, -z_lse2), tl.fma(y, slope2, -y_lse2), by_p, by_q, VENDOR)
    if whole < vocab_size:
        z = load_units(z_row + whole, columns, vocab_size - whole, inner, SOFTCAP, VENDOR, True)
        y = load_units(y_row + whole, columns, vocab_size - whole, inner, SOFTCAP, VENDOR, True)
        p_kl, q_kl = _add(p_kl, q_kl, tl.fma(z, slope2, -z_lse2), tl.fma(y, slope2, -y_lse2), by_p, by_q, VENDOR)
    tl.store(kl2_ptr + row * 2, tl.sum(p_kl))
    tl.store(kl2_ptr + row * 2 + 1, tl.sum(q_kl))


@triton.jit
def _add(p_kl, q_kl, log2_p, log2_q, by_p, by_q, VENDOR: tl.constexpr):
    """Add a block to both sums.

    Logarithms of ratios, not differences of logarithms: what exp2 rounds is in the mixture as well, so that it cancels.
    Of models that are nearly equal a difference would be all rounding.
    """
    p, q = tl.exp2(log2_p), tl.exp2(log2_q)
    by_m = reciprocal(mixture(p, q, by_p, by_q), VENDOR)
    # The logarithm of what has underflown has to be finite: it counts for nothing.
    p_log, q_log = log2(tl.fma(p, by_m, TINY), VENDOR), log2(tl.fma(q, by_m, TINY), VENDOR)
    return p_kl + tl.sum(p * p_log, axis=1), q_kl + tl.sum(q * q_log, axis=1)
