"""What the kernels share: the logit transform, base-2 logarithm and hyperbolic tangent, and the row layout.

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
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def block_columns(LANES: tl.constexpr):
    """Columns ``[LANES, VECTOR]`` of a block, in memory order."""
    return tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def load_units(row_ptr, columns, vocab_size, inner, SOFTCAP: tl.constexpr, MASKED: tl.constexpr):
    """Units of the logits at ``columns``; LOWEST beyond ``vocab_size``, where nothing is read."""
    mask = columns < vocab_size if MASKED else None
    return to_units(tl.load(row_ptr + columns, mask=mask, other=LOWEST if MASKED else None), inner, SOFTCAP)


@triton.jit
def to_units(raw, inner, SOFTCAP: tl.constexpr):
    """The transform up to its factor; LOWEST stays as it is, minus infinity becomes it."""
    if SOFTCAP:
        return tl.where(raw == LOWEST, LOWEST, tanh(raw * inner))
    # A NaN has to come through: it is how a caller learns of a broken row.
    return tl.maximum(raw, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tanh(x):
    """Hyperbolic tangent to a few units in the last place; the hardware's has 11 bits."""
    # Near 0 the quotient would cancel.
    square = x * x
    series = x * (1.0 + square * (-0.33333333 + square * (0.13333333 - square * 0.05396825)))
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    quotient = (1.0 - decay) / (1.0 + decay)
    return tl.where(square < 0.04, series, tl.where(x < 0.0, -quotient, quotient))


@triton.jit
def log2(x, HARDWARE_LOG: tl.constexpr):
    """Base-2 logarithm of a normal number: one instruction on NVIDIA, whose tl.log2 is a polynomial of a dozen.

    Its absolute error is 2^-22 for x in [0.5, 2], elsewhere its relative error is: below the rounding of the fp32
    logits that x comes from.
    """
    if HARDWARE_LOG:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.log2(x)


@triton.jit
def mixture(p, q, by_p, by_q):
    """``by_p p + by_q q``, never 0."""
    return by_p * p + (by_q * q + TINY)
