"""Logits under a softcap in the units of the passes, for those at a few ids."""

import triton
import triton.language as tl

from srpo_kernels.kernels.primitives import to_units


@triton.jit
def units_kernel(raw_ptr, units_ptr, count, inner, VENDOR: tl.constexpr, BLOCK: tl.constexpr):
    """Write the units of ``count`` raw logits, to the last bit those of the passes."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < count
    raw = tl.load(raw_ptr + columns, mask=mask, other=0.0)
    tl.store(units_ptr + columns, to_units(raw, inner, True, VENDOR, False), mask=mask)
