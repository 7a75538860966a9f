"""The gradient of a row's statistics with respect to its logits: all terms in one pass."""

import triton
import triton.language as tl

from srpo_kernels.kernels.primitives import VECTOR, block_columns, load_units, log2, mixture, reciprocal, to_units
from srpo_kernels.kernels.row_entries import ENTRY_NUMBERS, entry, load_numbers

# Of a row, whatever its terms: what stands before those of the divergences.
COMMON = tl.constexpr(5)


@triton.jit
def row_grad_kernel(
    z_ptr,
    y_ptr,
    out_ptr,
    ids_ptr,
    id_grads_ptr,
    coefficients_ptr,
    z_stride_row,
    y_stride_row,
    out_stride_row,
    vocab_size,
    num_ids,
    inner,
    slope2,
    FORWARD_KL: tl.constexpr,
    REVERSE_KL: tl.constexpr,
    STUDENT_KL: tl.constexpr,
    OVERLAP: tl.constexpr,
    ENTRIES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_IDS: tl.constexpr,
    VENDOR: tl.constexpr,
):
    """Write dlogits of a row: in place (``out_ptr`` is ``z_ptr``) or into another buffer of any floating dtype.

    ``coefficients`` ``[n, ...]``: student's and teacher's log-sum-exp in base 2; what multiplies p, p log2 p, and p at
    the ids. Then, where the terms are there: forward_kl's factor; reverse_kl's, and what it takes from the student's
    and the teacher's units; a mixture's, with ``STUDENT_KL`` or ``OVERLAP``: the models' shares, and the factors of
    these two; the numbers of ``entry``, its factor in them.
    ``ids`` and ``id_grads`` ``[n, num_ids]`` are tokens whose logits have gradients of their own, all but the
    divergence's; ids outside of ``[0, vocab_size)`` are another slice's.
    """
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * z_stride_row
    y_row = y_ptr + row * y_stride_row
    out_row = out_ptr + row * out_stride_row
    MIXTURE: tl.constexpr = STUDENT_KL or OVERLAP
    TEACHER: tl.constexpr = FORWARD_KL or REVERSE_KL or MIXTURE or ENTRIES
    WIDTH: tl.constexpr = (
        COMMON + FORWARD_KL + 3 * REVERSE_KL + 2 * MIXTURE + STUDENT_KL + OVERLAP + ENTRY_NUMBERS * ENTRIES
    )
    own = coefficients_ptr + row * WIDTH
    z_lse2, y_lse2, by_p, by_log, by_p_at_ids = (
        tl.load(own), tl.load(own + 1), tl.load(own + 2), tl.load(own + 3), tl.load(own + 4),
    )  # fmt: skip
    own += COMMON
    forward, reverse, mixed, entries = 0.0, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0), (0.0,)
    if FORWARD_KL:
        forward = tl.load(own)
        own += 1
    if REVERSE_KL:
        reverse = (tl.load(own), tl.load(own + 1), tl.load(own + 2))
        own += 3
    if MIXTURE:
        by_student_kl, by_overlap = 0.0, 0.0
        if STUDENT_KL:
            by_student_kl = tl.load(own + 2)
        if OVERLAP:
            by_overlap = tl.load(own + 2 + STUDENT_KL)
        mixed = (tl.load(own), tl.load(own + 1), by_student_kl, by_overlap)
        own += 2 + STUDENT_KL + OVERLAP
    if ENTRIES:
        entries = load_numbers(own)

    # The logits at the ids are read before anything is overwritten, by any of the program's threads.
    k = tl.arange(0, BLOCK_IDS)
    ids = tl.load(ids_ptr + row * num_ids + k, mask=k < num_ids, other=-1)
    id_grads = tl.load(id_grads_ptr + row * num_ids + k, mask=k < num_ids, other=0.0)
    here = (ids >= 0) & (ids < vocab_size)
    z_ids = to_units(tl.load(z_row + ids, mask=here, other=0.0), inner, SOFTCAP, VENDOR, False)
    y_ids = z_ids
    if TEACHER:
        y_ids = to_units(tl.load(y_row + ids, mask=here, other=0.0), inner, TEACHER_SOFTCAP, VENDOR, False)
    # The log-sum-exp may be that of the other tokens alone: by_p_at_ids is 0 then, and p must be finite.
    z_ids_lse2 = tl.maximum(z_lse2, z_ids * slope2 - 1.0)
    at_ids = _dlogits(
        z_ids, y_ids, id_grads, z_ids_lse2, y_lse2, by_p_at_ids, 0.0, forward, reverse, mixed, entries,
        slope2, FORWARD_KL, REVERSE_KL, STUDENT_KL, OVERLAP, ENTRIES, SOFTCAP, VENDOR,
    )  # fmt: skip

    tl.debug_barrier()

    columns = block_columns(LANES)
    BLOCK: tl.constexpr = LANES * VECTOR
    whole = vocab_size // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        z = load_units(z_row + start, columns, BLOCK, inner, SOFTCAP, VENDOR, False)
        y = z
        if TEACHER:
            y = load_units(y_row + start, columns, BLOCK, inner, TEACHER_SOFTCAP, VENDOR, False)
        dz = _dlogits(
            z, y, 0.0, z_lse2, y_lse2, by_p, by_log, forward, reverse, mixed, entries,
            slope2, FORWARD_KL, REVERSE_KL, STUDENT_KL, OVERLAP, ENTRIES, SOFTCAP, VENDOR,
        )  # fmt: skip
        tl.store(out_row + start + columns, dz.to(out_ptr.dtype.element_ty))
    if whole < vocab_size:
        rest = vocab_size - whole
        z_rest = load_units(z_row + whole, columns, rest, inner, SOFTCAP, VENDOR, True)
        y_rest = z_rest
        if TEACHER:
            y_rest = load_units(y_row + whole, columns, rest, inner, TEACHER_SOFTCAP, VENDOR, True)
        dz_rest = _dlogits(
            z_rest, y_rest, 0.0, z_lse2, y_lse2, by_p, by_log, forward, reverse, mixed, entries,
            slope2, FORWARD_KL, REVERSE_KL, STUDENT_KL, OVERLAP, ENTRIES, SOFTCAP, VENDOR,
        )  # fmt: skip
        tl.store(out_row + whole + columns, dz_rest.to(out_ptr.dtype.element_ty), mask=columns < rest)
    # Another thread may have written where an id is. Ids are read again: kept, they would take registers of the loop.
    tl.debug_barrier()
    ids = tl.load(ids_ptr + row * num_ids + k, mask=k < num_ids, other=-1)
    here = (ids >= 0) & (ids < vocab_size)
    tl.store(out_row + ids, at_ids.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def _dlogits(
    z,
    y,
    own_grad,
    z_lse2,
    y_lse2,
    by_p,
    by_log,
    forward,
    reverse,
    mixed,
    entries,
    slope2,
    FORWARD_KL: tl.constexpr,
    REVERSE_KL: tl.constexpr,
    STUDENT_KL: tl.constexpr,
    OVERLAP: tl.constexpr,
    ENTRIES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    VENDOR: tl.constexpr,
):
    """``own_grad + p (by_p + by_log log2 p)``, and the terms of each divergence.

    Forward KL has ``- forward q``. Reverse KL has p times the log-ratio to the teacher, less its mean, so that a row
    that has one token alone gets exactly 0. A mixture m has ``p log2(p / m)`` with ``STUDENT_KL``, and with ``OVERLAP``
    ``p q / m``. A softcap multiplies all of it by ``1 - tanh^2``.
    """
    log2_p = tl.fma(z, slope2, -z_lse2)
    p = tl.exp2(log2_p)
    factor = by_p + by_log * log2_p
    if FORWARD_KL:
        own_grad -= forward * tl.exp2(tl.fma(y, slope2, -y_lse2))
    if REVERSE_KL:
        by_ratio, z_own, y_own = reverse
        factor += by_ratio * ((z - z_own) - (y - y_own))
    if STUDENT_KL or OVERLAP:
        share_p, share_q, by_student_kl, by_overlap = mixed
        q = tl.exp2(tl.fma(y, slope2, -y_lse2))
        m = mixture(p, q, share_p, share_q)
        if STUDENT_KL:
            factor += by_student_kl * (log2_p - log2(m, VENDOR))
        if OVERLAP:
            factor += by_overlap * (q * reciprocal(m, VENDOR))
    if ENTRIES:
        _, g = entry(z, y, entries, slope2, VENDOR)
        own_grad += g
    dz = own_grad + p * factor
    if SOFTCAP:
        dz *= 1.0 - z * z
    return dz
