"""One compiled configuration of a kernel on one target: what its machine code asks for, and the rules for that."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from srpo_kernels.kernels.variants import Variant
from tools.gate.hazards import early_reads
from tools.gate.machine_code import MachineCode, read
from tools.gate.targets import ENTRIES_ISSUE_RATIO, ISSUE_RATIO, SOFTCAP_ISSUE_RATIO, Kind, Target, TargetName

_LOAD_BYTES = 16

# Instructions per element of a row pass without softcap on sm_90, by kernel and what it computes.
_INSTRUCTIONS: dict[tuple[str, object], int] = {
    ("row_stats", False): 14,
    ("row_stats", True): 34,
    # A difference of logarithms would be three fewer, and noise where the models are nearly equal.
    ("row_mixture", None): 18,
    ("row_grad", "none"): 12,
    ("row_grad", "mixture"): 20,
    # Of any divergence, which each row may have of its own: more logarithms, and a bound.
    ("row_entries", None): 40,
    ("row_grad", "entries"): 44,
}


@dataclass(frozen=True)
class Line:
    """One kernel configuration on one target; empty where a tile kernel has no elements to count by."""

    kernel: str
    label: str
    target: TargetName
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    # Blocks that fit on a multiprocessor, and the share of its warps that they are.
    blocks: int
    occupancy: float
    # Bytes of a thread's widest load, and of the narrowest one in the main loop.
    widest_load: int
    narrowest_loop_load: int
    tensor_core: str
    bytes_per_element: int
    # Iterations of the kernel's loop in one pass of the compiled one.
    unrolled: float | None
    # Instructions per element.
    fp32: float | None
    alu: float | None
    special: float | None
    total: float | None
    # Time in the busiest pipe over time in the memory.
    device: str | None
    issue_ratio: float | None
    pipe: str | None
    broken: str
    compile_seconds: float


@triton.jit  # type: ignore[untyped-decorator]
def _nothing_kernel() -> None:
    pass


def what_is_missing(target: Target) -> str | None:
    """Why no kernel can be compiled for ``target`` and read here; None where one can.

    A wheel of Triton may come without the assembler or the linker of a target, or be older than the target.
    """
    try:
        read(_compile(ASTSource(_nothing_kernel, {}), target, {}))
    except Exception as error:
        return f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return None


def _compile(source: ASTSource, target: Target, options: dict[str, int | bool]) -> CompiledKernel:
    return triton.compile(source, GPUTarget(target.backend, target.arch, target.warp_size), options)


def measure(variant: Variant, target: Target) -> Line:
    """Compile one configuration and read its machine code."""
    names = list(variant.function.arg_names)
    source = ASTSource(
        fn=variant.function,
        signature=variant.signature,
        constexprs=variant.constexprs,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible},
    )
    start = time.perf_counter()
    try:
        kernel = _compile(source, target, variant.options)
    except Exception as error:
        raise RuntimeError(f"{variant.kernel}, {variant.label} does not compile for {target.name}") from error
    seconds = time.perf_counter() - start
    early = 0 if target.hazard is None else early_reads(kernel.asm["amdgcn"], target.hazard)
    return line_of(variant, target, read(kernel), seconds, early)


def line_of(variant: Variant, target: Target, code: MachineCode, seconds: float, early: int = 0) -> Line:
    """What the machine code of a configuration amounts to; ``early`` transcendentals are read before they are there."""
    blocks = target.resident_blocks(code.registers, code.shared_bytes, code.tensor_columns, variant.num_warps)
    size = variant.bytes_per_element
    unrolled = total = ratio = pipe = None
    counts: dict[Kind, float] = {}
    if size and code.loop_bytes:
        counts = code.per_element(size)
        total = sum(counts.values())
        threads = variant.num_warps * target.warp_size
        unrolled = float(code.elements_per_pass(size) * threads / variant.elements_per_iteration)
        if target.device is not None:
            ratio, pipe = target.device.issue_ratio(counts, size)
    return Line(
        kernel=variant.kernel,
        label=variant.label,
        target=target.name,
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
        registers=code.registers,
        spill_bytes=code.spill_bytes,
        shared_bytes=code.shared_bytes,
        blocks=blocks,
        occupancy=blocks * variant.num_warps / target.warps,
        widest_load=code.widest_load,
        narrowest_loop_load=code.narrowest_loop_load,
        tensor_core=code.tensor_core,
        bytes_per_element=size,
        unrolled=unrolled,
        fp32=counts.get("fp32"),
        alu=counts.get("alu"),
        special=counts.get("special"),
        total=total,
        device=None if target.device is None else target.device.name,
        issue_ratio=ratio,
        pipe=pipe,
        broken="; ".join(_broken_rules(variant, target, code, unrolled, total, ratio, early)),
        compile_seconds=seconds,
    )


def _broken_rules(
    variant: Variant,
    target: Target,
    code: MachineCode,
    unrolled: float | None,
    total: float | None,
    ratio: float | None,
    early: int,
) -> Iterator[str]:
    if code.spill_bytes:
        yield f"spills {code.spill_bytes} bytes"
    if early:
        yield f"{early} transcendentals are read before they are there"
    if code.shared_bytes > target.shared_per_block:
        yield f"{code.shared_bytes} bytes of shared memory, of {target.shared_per_block}"
    # Narrower loads of tiles are no asynchronous copies: they are not pipelined.
    if (variant.bytes_per_element or "hidden_size" in variant.divisible) and code.narrowest_loop_load < _LOAD_BYTES:
        yield f"loads of {code.narrowest_loop_load} bytes"
    if variant.bytes_per_element:
        if unrolled is None or not unrolled.is_integer():
            yield f"the main loop is {unrolled} iterations"
    elif _multiplies_halves(variant) and code.tensor_core != target.tensor_core:
        yield f"{code.tensor_core} instead of {target.tensor_core}"
    limit = SOFTCAP_ISSUE_RATIO if variant.constexprs.get("SOFTCAP") else ISSUE_RATIO
    if variant.kernel == "row_entries" or variant.constexprs.get("ENTRIES"):
        limit = ENTRIES_ISSUE_RATIO
    if ratio is not None and ratio > limit:
        yield f"issue/memory {ratio:.3f} > {limit}"
    if target.name == "sm_90" and total is not None and not variant.constexprs.get("SOFTCAP"):
        bound = _INSTRUCTIONS.get((variant.kernel, _kind(variant)))
        if bound is not None and total > bound:
            yield f"{total:.1f} instructions > {bound}"


def _multiplies_halves(variant: Variant) -> bool:
    """Whether it has both operands of a dot in bf16 or fp16."""
    return sum(kind in ("*bf16", "*fp16") for kind in variant.signature.values()) > 1


def _kind(variant: Variant) -> object:
    """What a row pass computes, as far as its bound depends on it."""
    terms = {name for name, on in variant.constexprs.items() if on is True}
    if variant.kernel == "row_stats":
        return "TEACHER" in terms
    if variant.kernel != "row_grad":
        return None
    mixed, kls = bool(terms & {"STUDENT_KL", "OVERLAP"}), bool(terms & {"FORWARD_KL", "REVERSE_KL"})
    match mixed, kls, "ENTRIES" in terms:
        case False, False, False:
            return "none"
        case True, False, False:
            return "mixture"
        case False, False, True:
            return "entries"
        case _:
            return "several"
