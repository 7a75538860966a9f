"""What a row's divergence from a mixture is made of, given both models' log-sum-exps."""

import triton
import triton.language as tl

from srpo_kernels.kernels.primitives import TINY, VECTOR, block_columns, load_units, log2, mixture, reciprocal


@triton.jit
def row_mixture_kernel(
    z_ptr,
    y_ptr,
    coefficients_ptr,
    sums_ptr,
    z_stride_row,
    y_stride_row,
    vocab_size,
    inner,
    slope2,
    STUDENT_KL: tl.constexpr,
    TEACHER_KL: tl.constexpr,
    OVERLAP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    VENDOR: tl.constexpr,
):
    """Write those of ``KL(p || m)``, ``KL(q || m)``, in bits, and ``sum(p q / m)`` that are asked for, side by side.

    ``coefficients`` ``[n, 4]``: student's and teacher's log-sum-exp in base 2, their shares in the mixture
    ``m``. Every logit is read once; vocabulary slices add up.
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
    overlap = tl.zeros([LANES], tl.float32)
    for start in range(0, whole, BLOCK):
        z = load_units(z_row + start, columns, BLOCK, inner, SOFTCAP, VENDOR, False)
        y = load_units(y_row + start, columns, BLOCK, inner, TEACHER_SOFTCAP, VENDOR, False)
        p_kl, q_kl, overlap = _add(
            p_kl, q_kl, overlap, tl.fma(z, slope2, -z_lse2), tl.fma(y, slope2, -y_lse2), by_p, by_q,
            STUDENT_KL, TEACHER_KL, OVERLAP, VENDOR,
        )  # fmt: skip
    if whole < vocab_size:
        z = load_units(z_row + whole, columns, vocab_size - whole, inner, SOFTCAP, VENDOR, True)
        y = load_units(y_row + whole, columns, vocab_size - whole, inner, TEACHER_SOFTCAP, VENDOR, True)
        p_kl, q_kl, overlap = _add(
            p_kl, q_kl, overlap, tl.fma(z, slope2, -z_lse2), tl.fma(y, slope2, -y_lse2), by_p, by_q,
            STUDENT_KL, TEACHER_KL, OVERLAP, VENDOR,
        )  # fmt: skip
    sums = sums_ptr + row * (STUDENT_KL + TEACHER_KL + OVERLAP)
    if STUDENT_KL:
        tl.store(sums, tl.sum(p_kl))
    if TEACHER_KL:
        tl.store(sums + STUDENT_KL, tl.sum(q_kl))
    if OVERLAP:
        tl.store(sums + STUDENT_KL + TEACHER_KL, tl.sum(overlap))


@triton.jit
def _add(
    p_kl,
    q_kl,
    overlap,
    log2_p,
    log2_q,
    by_p,
    by_q,
    STUDENT_KL: tl.constexpr,
    TEACHER_KL: tl.constexpr,
    OVERLAP: tl.constexpr,
    VENDOR: tl.constexpr,
):
    """Add a block to the sums.

    Logarithms of ratios, not differences of logarithms: what exp2 rounds is in the mixture as well, so that it cancels.
    Of models that are nearly equal a difference would be all rounding.
    """
    p, q = tl.exp2(log2_p), tl.exp2(log2_q)
    by_m = reciprocal(mixture(p, q, by_p, by_q), VENDOR)
    # The logarithm of what has underflown has to be finite: it counts for nothing.
    p_ratio, q_ratio = tl.fma(p, by_m, TINY), tl.fma(q, by_m, TINY)
    if STUDENT_KL:
        p_kl += tl.sum(p * log2(p_ratio, VENDOR), axis=1)
    if TEACHER_KL:
        q_kl += tl.sum(q * log2(q_ratio, VENDOR), axis=1)
    if OVERLAP:
        overlap += tl.sum(p * q_ratio, axis=1)
    return p_kl, q_kl, overlap
