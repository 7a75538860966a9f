"""What a compiled kernel asks of a multiprocessor, read from its machine code: SASS, or the text that AMD assembles.

The *main loop* is where the instructions per element are counted. Compilers split a loop over a row: ptxas peels
iterations and unrolls the rest by four, with a second loop for what is left over. Of the natural loops that read global
memory and hold no other such loop, the main one reads the widest vectors, then the most bytes per pass, then comes
first. How many elements a pass handles follows from the bytes that it moves, so unrolling needs no guess.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from triton import knobs
from triton.compiler import CompiledKernel

from tools.gate.targets import KINDS, Kind


@dataclass(frozen=True)
class Instruction:
    """One instruction: bytes that a thread moves from and to global memory, and where control goes next."""

    opcode: str
    kind: Kind
    load_bytes: int
    store_bytes: int
    label: str | None
    falls_through: bool


@dataclass(frozen=True)
class Program:
    """Instructions in memory order, and the index that each label stands before."""

    instructions: list[Instruction]
    labels: dict[str, int]

    def successors(self, index: int) -> list[int]:
        """Indices that may come after one."""
        instruction = self.instructions[index]
        following = [index + 1] if instruction.falls_through else []
        if instruction.label is not None:
            following.append(self.labels[instruction.label])
        return [successor for successor in following if successor < len(self.instructions)]


@dataclass(frozen=True)
class MachineCode:
    """A kernel's resources per thread, per block, and per pass of its main loop."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_columns: int
    widest_load: int
    # HMMA, HGMMA, UTCHMMA, MFMA, WMMA or none.
    tensor_core: str
    # Of one thread in one pass of the main loop.
    narrowest_loop_load: int
    loop_bytes: int
    loop_instructions: dict[Kind, int]

    def elements_per_pass(self, bytes_per_element: int) -> Fraction:
        """Elements of a row that a thread handles in one pass of the main loop."""
        return Fraction(self.loop_bytes, bytes_per_element)

    def per_element(self, bytes_per_element: int) -> dict[Kind, float]:
        """Instructions of each kind for one element of a row."""
        elements = self.elements_per_pass(bytes_per_element)
        return {kind: float(self.loop_instructions[kind] / elements) for kind in KINDS}


def read(kernel: CompiledKernel) -> MachineCode:
    """Disassemble a compiled kernel."""
    if "cubin" in kernel.asm:
        program, (registers, spill_bytes) = parse_sass(_tool("nvdisasm", kernel)), _nvidia_registers(kernel)
    else:
        text = kernel.asm["amdgcn"]
        program, (registers, spill_bytes) = parse_amdgcn(text), _amd_registers(text)
    loop = [program.instructions[index] for index in sorted(main_loop(program))]
    kinds = Counter(instruction.kind for instruction in loop)
    return MachineCode(
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=kernel.metadata.shared,
        tensor_columns=getattr(kernel.metadata, "tmem_size", 0),
        widest_load=max((instruction.load_bytes for instruction in program.instructions), default=0),
        tensor_core=_tensor_core(instruction.opcode for instruction in program.instructions),
        narrowest_loop_load=min((instruction.load_bytes for instruction in loop if instruction.load_bytes), default=0),
        loop_bytes=sum(instruction.load_bytes + instruction.store_bytes for instruction in loop),
        loop_instructions={kind: kinds[kind] for kind in KINDS},
    )


def main_loop(program: Program) -> frozenset[int]:
    """Indices of the main loop's instructions, empty where no loop reads global memory."""
    loads = [instruction.load_bytes for instruction in program.instructions]
    reading = [loop for loop in natural_loops(program) if any(loads[index] for index in loop)]
    innermost = [loop for loop in reading if not any(other < loop for other in reading)]
    return max(
        innermost,
        key=lambda loop: (max(loads[i] for i in loop), sum(loads[i] for i in loop), -min(loop)),
        default=frozenset(),
    )


def natural_loops(program: Program) -> list[frozenset[int]]:
    """The loops of a program, those with a common header as one.

    A jump to an earlier address alone makes no loop: compilers move cold code to the end and jump back from there. A
    loop's header is what every way to its last instruction passes.
    """
    size = len(program.instructions)
    successors = [program.successors(index) for index in range(size)]
    predecessors: list[list[int]] = [[] for _ in range(size)]
    for index, following in enumerate(successors):
        for successor in following:
            predecessors[successor].append(index)
    reachable = _reach([0], successors, None)
    loops = []
    for header in sorted({index for index in program.labels.values() if index in reachable}):
        around = _reach([0], successors, header)
        last = [index for index in predecessors[header] if index in reachable and index not in around]
        if last:
            loops.append(frozenset(_reach(last, predecessors, header) & reachable | {header}))
    return loops


def _reach(start: list[int], edges: list[list[int]], without: int | None) -> set[int]:
    """Indices on a path from ``start`` that avoids one index."""
    seen: set[int] = set()
    pending = list(start)
    while pending:
        index = pending.pop()
        if index != without and index not in seen:
            seen.add(index)
            pending += edges[index]
    return seen


# `@!P0 LDG.E.128 R4, desc[UR10][R28.64] ;` behind its address.
_SASS = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?P<predicate>@!?\w+)?\s*(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*)")
_SASS_LABEL = re.compile(r"(\.L_x_\d+):")
_SASS_JUMP = re.compile(r"(?P<condition>.*?)`\((\.L_x_\d+)\)")
_SASS_ENDS = {"EXIT", "RET", "BRX", "JMX", "KILL"}
_SASS_WIDTH = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1}


def parse_sass(text: str) -> Program:
    """The output of `nvdisasm -c`."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if match := _SASS_LABEL.match(line):
            labels[match[1]] = len(instructions)
        elif match := _SASS.match(line):
            instructions.append(_sass(match["opcode"], match["operands"], match["predicate"] is not None))
    return Program(instructions, labels)


def _sass(opcode: str, operands: str, conditional: bool) -> Instruction:
    name, *modifiers = opcode.split(".")
    width = next((_SASS_WIDTH[modifier] for modifier in modifiers if modifier in _SASS_WIDTH), 4)
    jump = _SASS_JUMP.match(operands) if name == "BRA" else None
    if jump is not None:
        conditional |= jump["condition"].strip() != ""
    return Instruction(
        opcode=opcode,
        kind=_sass_kind(name),
        load_bytes=width if name in ("LDG", "LDGSTS") else 0,
        store_bytes=width if name == "STG" else 0,
        label=None if jump is None else jump[2],
        falls_through=conditional or (name not in _SASS_ENDS and name != "BRA"),
    )


# By the first letters of the name. Multiply-adds on integers and on pairs of halves run in the FMA pipe, which ptxas
# also has move registers; what converts between fp32 and integers runs beside the transcendentals.
_SASS_KINDS: dict[Kind, tuple[str, ...]] = {
    "memory": ("LD", "ST", "ATOM", "RED", "SHFL", "CCTL", "MEMBAR", "SYNCS", "UTMA", "UBLKCP", "ARRIVES"),
    "control": (
        "BAR", "BRA", "BREAK", "BRX", "BSSY", "BSYNC", "CALL", "DEPBAR", "ELECT", "ERRBAR", "EXIT", "FENCE", "HGMMA",
        "HMMA", "NANOSLEEP", "NOP", "RET", "UTC", "WARPGROUP", "WARPSYNC", "YIELD",
    ),
    "scalar": ("U", "R2UR", "S2UR", "S2R", "CS2R"),
    "special": ("MUFU", "I2F.", "F2I", "F2F.", "FRND", "POPC", "FLO", "BREV"),
    "fp32": ("FADD", "FMUL", "FFMA", "IMAD", "HADD2", "HMUL2", "HFMA2"),
}  # fmt: skip


def _sass_kind(name: str) -> Kind:
    return next((kind for kind, prefixes in _SASS_KINDS.items() if f"{name}.".startswith(prefixes)), "alu")


_AMD = re.compile(r"\s+(?P<opcode>[a-z]\w+)(?P<operands>[^;]*)")
_AMD_LABEL = re.compile(r"(\.LBB\w+):")
_AMD_MOVE = re.compile(
    r"(?:global|buffer|flat)_(?P<way>load|store)_(?:lds_)?(?P<width>dword(?:x\d)?|\w*short|\w*byte|[biu]\d+|d16\w*)"
)
_AMD_SPECIAL = re.compile(r"v_(?:exp|log|rcp|rsq|sqrt|sin|cos)_")
_AMD_SCALAR_CONTROL = re.compile(r"s_(?:\w*branch|barrier|endpgm|nop|setprio|sleep|wait|sched|delay|clause)")


def parse_amdgcn(text: str) -> Program:
    """A function in the assembler's text."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.split("\n.Lfunc_end", 1)[0].splitlines():
        if match := _AMD_LABEL.match(line):
            labels[match[1]] = len(instructions)
        elif match := _AMD.match(line):
            instructions.append(_amd(match["opcode"], match["operands"]))
    return Program(instructions, labels)


def _amd(opcode: str, operands: str) -> Instruction:
    move = _AMD_MOVE.match(opcode)
    width = 0 if move is None else _amd_width(move["width"])
    return Instruction(
        opcode=opcode,
        kind=_amd_kind(opcode),
        load_bytes=width if move is not None and move["way"] == "load" else 0,
        store_bytes=width if move is not None and move["way"] == "store" else 0,
        label=operands.strip() if "branch" in opcode else None,
        falls_through=opcode not in ("s_branch", "s_endpgm", "s_setpc_b64"),
    )


def _amd_width(width: str) -> int:
    # RDNA's names say how many bits.
    if bits := re.fullmatch(r"[biu](\d+)", width):
        return int(bits[1]) // 8
    if width.startswith("d16"):
        return 1 if width.endswith("8") else 2
    if width.startswith("dword"):
        return 4 * int(width.removeprefix("dword").removeprefix("x") or 1)
    return 2 if width.endswith("short") else 1


def _amd_kind(opcode: str) -> Kind:
    if opcode.startswith("s_"):
        if opcode.startswith(("s_load", "s_buffer_load")):
            return "memory"
        return "control" if _AMD_SCALAR_CONTROL.match(opcode) else "scalar"
    if not opcode.startswith("v_"):
        return "memory"
    if opcode.startswith(("v_mfma", "v_wmma", "v_swmmac")):
        return "control"
    if _AMD_SPECIAL.match(opcode):
        return "special"
    return "fp32" if "_f32" in opcode and "_cmp" not in opcode else "alu"


# A kernel with tcgen05 or wgmma may hold fragments of the older kind too: the newest one counts.
_TENSOR_CORES = (("UTCHMMA", "UTCHMMA"), ("HGMMA", "HGMMA"), ("HMMA", "HMMA"), ("v_mfma", "MFMA"), ("v_wmma", "WMMA"))


def _tensor_core(opcodes: Iterable[str]) -> str:
    names = list(opcodes)
    return next((name for prefix, name in _TENSOR_CORES if any(op.startswith(prefix) for op in names)), "none")


def _nvidia_registers(kernel: CompiledKernel) -> tuple[int, int]:
    """Registers and bytes of stack of a thread: Triton has no local arrays, so that a stack is spilled registers."""
    usage = _tool("cuobjdump", kernel)
    return int(_field(r"REG:(\d+)", usage)), int(_field(r"STACK:(\d+)", usage))


def _amd_registers(text: str) -> tuple[int, int]:
    """The same of the text's metadata; scalar registers that spill lie in lanes of vector registers."""
    spilled = sum(int(_field(rf"\.{file}gpr_spill_count:\s+(\d+)", text)) for file in "vs")
    scratch = int(_field(r"\.private_segment_fixed_size:\s+(\d+)", text))
    return int(_field(r"\.vgpr_count:\s+(\d+)", text)), max(scratch, 4 * spilled)


def _field(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the disassembler's output has no {pattern}")
    return match[1]


# Control flow needs no dataflow analysis, a third of the time.
_OPTIONS = {"nvdisasm": ("-c", "-ndf"), "cuobjdump": ("-res-usage",)}


def _tool(name: str, kernel: CompiledKernel) -> str:
    # Looked up where it is wanted: a Triton for AMD alone comes without it.
    path = getattr(knobs.nvidia, name).path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run([path, *_OPTIONS[name], file.name], capture_output=True, text=True, check=True)
    return done.stdout
