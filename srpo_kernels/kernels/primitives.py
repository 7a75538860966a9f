"""What the kernels share: the logit transform, base-2 logarithm, and the row layout.

Kernels work in base 2 and in *units*: a logit is ``slope2 * unit``, where the unit is the raw logit, or with a softcap
``tanh(inner * raw)``. The temperature, the scales and log2(e) are all in ``slope2``, one multiply that folds into the
exponent's subtraction.
"""

import triton
import triton.language as tl

# Elements of one 16-byte load. A program's block of a row is [LANES, VECTOR]: one thread holds whole vectors, so that a
# reduction over the second axis is a few instructions of that thread and no message between threads.
VECTOR = tl.constexpr(4)

# Stands for minus infinity: 0 * LOWEST is 0. Also marks a logit that is taken out of its row.
LOWEST = tl.constexpr(-1e30)

# The smallest normal fp32: added to a mixture of two probabilities, it keeps the logarithm finite.
TINY = tl.constexpr(1.1754943508222875e-38)

LOG2_E = tl.constexpr(1.4426950408889634)

# tanh x = x (1 + TANH_3 x^2 + TANH_5 x^4 + TANH_7 x^6) up to a relative error of 1.2e-7 for |x| < 0.4: a minimax fit.
TANH_3 = tl.constexpr(-0.3333188232466564)
TANH_5 = tl.constexpr(0.13277630369336305)
TANH_7 = tl.constexpr(-0.0477942819238347)

# Between a transcendental and the use of its result CDNA 3 wants a wait state, and RDNA 3 that the result is there. The
# compiler, which sees to that elsewhere, does not look into assembly.
CDNA_LOG = tl.constexpr("v_log_f32 $0, $1\n\ts_nop 0")
CDNA_RECIPROCAL = tl.constexpr("v_rcp_f32 $0, $1\n\ts_nop 0")
RDNA_LOG = tl.constexpr("v_log_f32 $0, $1\n\ts_waitcnt_depctr 0xfff")
RDNA_RECIPROCAL = tl.constexpr("v_rcp_f32 $0, $1\n\ts_waitcnt_depctr 0xfff")


@triton.jit
def block_columns(LANES: tl.constexpr):
    """Columns ``[LANES, VECTOR]`` of a block, in memory order."""
    return tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def load_units(row_ptr, columns, vocab_size, inner, SOFTCAP: tl.constexpr, VENDOR: tl.constexpr, MASKED: tl.constexpr):
    """Units of the logits at ``columns``; LOWEST beyond ``vocab_size``, where nothing is read."""
    mask = columns < vocab_size if MASKED else None
    raw = tl.load(row_ptr + columns, mask=mask, other=LOWEST if MASKED else None)
    return to_units(raw, inner, SOFTCAP, VENDOR, MASKED)


@triton.jit
def to_units(raw, inner, SOFTCAP: tl.constexpr, VENDOR: tl.constexpr, MARKED: tl.constexpr):
    """The transform up to its factor; where some are ``MARKED`` as LOWEST, they stay so. Minus infinity becomes it."""
    if SOFTCAP:
        capped = tanh(raw * inner, VENDOR)
        return tl.where(raw == LOWEST, LOWEST, capped) if MARKED else capped
    # A NaN has to come through: it is how a caller learns of a broken row.
    return tl.maximum(raw, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tanh(x, VENDOR: tl.constexpr):
    """Good to two units in the last place, also near 0, where most logits under a softcap are.

    ``1 - 2 / (1 + e^2x)`` has an absolute error of that size; below 0.4 a polynomial takes its place.
    """
    far = 1.0 - 2.0 * reciprocal(1.0 + tl.exp2(x * (2.0 * LOG2_E)), VENDOR)
    u = x * x
    near = x * tl.fma(u, tl.fma(u, tl.fma(u, TANH_7, TANH_5), TANH_3), 1.0)
    return tl.where(u < 0.16, near, far)


@triton.jit
def log2(x, VENDOR: tl.constexpr):
    """Base-2 logarithm of a normal number in one instruction; in Triton it is a polynomial of a dozen.

    NVIDIA's absolute error is 2^-22 for x in [0.5, 2], elsewhere its relative error is: below the rounding of the fp32
    logits that x comes from.
    """
    if VENDOR == "nvidia":
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    if VENDOR == "cdna":
        return tl.inline_asm_elementwise(CDNA_LOG, "=v,v", [x], dtype=tl.float32, is_pure=True, pack=1)
    if VENDOR == "rdna":
        return tl.inline_asm_elementwise(RDNA_LOG, "=v,v", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.log2(x)


@triton.jit
def reciprocal(x, VENDOR: tl.constexpr):
    """``1 / x`` to a unit in the last place, without the slow path of a division for what x is not: subnormal."""
    if VENDOR == "nvidia":
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    if VENDOR == "cdna":
        return tl.inline_asm_elementwise(CDNA_RECIPROCAL, "=v,v", [x], dtype=tl.float32, is_pure=True, pack=1)
    if VENDOR == "rdna":
        return tl.inline_asm_elementwise(RDNA_RECIPROCAL, "=v,v", [x], dtype=tl.float32, is_pure=True, pack=1)
    return 1.0 / x


@triton.jit
def mixture(p, q, by_p, by_q):
    """``by_p p + by_q q``, never 0."""
    return by_p * p + (by_q * q + TINY)
