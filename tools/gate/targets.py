"""The devices that the kernels are compiled for, and the data-sheet numbers that their machine code is held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from srpo_kernels.verify.data_sheets import DATA_SHEETS
from tools.gate.hazards import Hazard

# What an instruction occupies. On NVIDIA `fp32` is the FMA pipe, where integer multiply-adds run too, and `alu` the
# integer pipe, where compares, minima, selects and conversions run too; on AMD they are the vector instructions on fp32
# and on anything else. `special` is exp2, log2, reciprocal and their like, `scalar` what a warp computes once for all
# its lanes.
Kind = Literal["fp32", "alu", "special", "scalar", "memory", "control"]
KINDS: tuple[Kind, ...] = get_args(Kind)

TargetName = Literal[
    "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"
]

# Memory has to be what limits a row pass: at most this much of its time in the busiest pipe, which leaves room for what
# a count of instructions does not see.
ISSUE_RATIO = 0.7
# A softcap's tanh is two more special functions per logit and, for logits near 0 to keep their relative accuracy, a
# polynomial. Few models want it; on an MI300X it makes jsd's statistics a tenth slower than their memory.
SOFTCAP_ISSUE_RATIO = 1.1
# A divergence of any kind in each row: its logarithms take the time, and few rows have one.
ENTRIES_ISSUE_RATIO = 1.25

_KIB = 1024


@dataclass(frozen=True)
class Pipe:
    """An execution resource of a multiprocessor: threads per clock, and slots that an instruction of a kind takes."""

    name: str
    lanes: int
    slots: Mapping[Kind, int]


@dataclass(frozen=True)
class Device:
    """A product's peak rates, each of one multiprocessor (AMD: compute unit).

    ``tensor_flop_per_clock`` are those of bf16 dots, ``l2_bytes_per_clock`` what it reads from the L2 cache.
    """

    name: str
    bytes_per_clock: float
    tensor_flop_per_clock: float
    l2_bytes_per_clock: float
    pipes: tuple[Pipe, ...]

    def issue_ratio(self, per_element: Mapping[Kind, float], bytes_per_element: int) -> tuple[float, str]:
        """Time in the busiest pipe over the time in memory, and that pipe's name."""
        memory = bytes_per_element / self.bytes_per_clock
        clocks = [
            (sum(n * per_element[kind] for kind, n in pipe.slots.items()) / pipe.lanes, pipe.name)
            for pipe in self.pipes
        ]
        busiest, name = max(clocks)
        return busiest / memory, name


@dataclass(frozen=True)
class Target:
    """Limits of an architecture: bytes of shared memory, 32-bit registers, warps and blocks of a multiprocessor."""

    name: TargetName
    backend: Literal["cuda", "hip"]
    arch: int | str
    warp_size: int
    shared_per_block: int
    shared: int
    # The CUDA runtime's own part of every block's shared memory.
    shared_reserved: int
    shared_granule: int
    # A warp's registers lie in one of four partitions, in whole granules.
    registers_per_partition: int
    register_granule: int
    warps: int
    blocks: int
    # What a dot of bf16 or fp16 has to become.
    tensor_core: str
    tensor_memory_columns: int = 0
    # What has to come between a transcendental and the use of its result.
    hazard: Hazard | None = None
    device: Device | None = None

    def resident_blocks(self, registers: int, shared: int, tensor_columns: int, num_warps: int) -> int:
        """Blocks that fit on a multiprocessor: theoretical occupancy."""
        warp_registers = _round_up(registers * self.warp_size, self.register_granule)
        warps = min(self.warps, _PARTITIONS * (self.registers_per_partition // warp_registers))
        limits = [self.blocks, warps // num_warps]
        if used := shared + self.shared_reserved:
            limits.append(self.shared // _round_up(used, self.shared_granule))
        if tensor_columns:
            limits.append(self.tensor_memory_columns // tensor_columns)
        return min(limits)


# Of an SM and of a compute unit alike.
_PARTITIONS = 4


def _round_up(value: int, granule: int) -> int:
    return -(-value // granule) * granule


def _bytes_per_clock(name: str, multiprocessors: int, ghz: float) -> float:
    """Of one multiprocessor, with the data sheet's bandwidth."""
    return DATA_SHEETS[name].gigabytes_per_second / ghz / multiprocessors


def _tensor_flop_per_clock(name: str, multiprocessors: int, ghz: float) -> float:
    return 1e3 * DATA_SHEETS[name].teraflops / ghz / multiprocessors


# Of the whole cache of an A100, bytes per clock, by NVIDIA's A100 white paper; it gives none of an H100, which is
# taken to have the same.
_NVIDIA_L2 = 5_120


def _nvidia(name: str, *, multiprocessors: int, ghz: float, fp32_lanes: int) -> Device:
    """A data-sheet's clock and bandwidth with the SM's rates.

    Those are results per clock and SM in the CUDA C++ Programming Guide, "Throughput of Native Arithmetic
    Instructions", compute capabilities 8.0 and 9.0: fp32 add, multiply and multiply-add 64 and 128; integer add, shift,
    logic, compare, minimum and maximum 64; rcp, rsqrt, ex2, lg2 16. The four schedulers of an SM issue one warp's
    instruction each per clock.
    """
    return Device(
        name,
        _bytes_per_clock(name, multiprocessors, ghz),
        _tensor_flop_per_clock(name, multiprocessors, ghz),
        _NVIDIA_L2 / multiprocessors,
        (
            Pipe("issue", 128, dict.fromkeys(KINDS, 1)),
            Pipe("fp32", fp32_lanes, {"fp32": 1}),
            Pipe("alu", 64, {"alu": 1}),
            Pipe("special", 16, {"special": 1}),
        ),
    )


# NVIDIA A100 data sheet, SXM, 80 GB: 19.5 TFLOPS of fp32 are 108 SMs x 64 FMAs at 1.41 GHz.
_A100 = _nvidia("A100", multiprocessors=108, ghz=1.41, fp32_lanes=64)

# NVIDIA H100 data sheet, SXM: 67 TFLOPS of fp32 are 132 SMs x 128 FMAs at 1.98 GHz.
_H100 = _nvidia("H100", multiprocessors=132, ghz=1.98, fp32_lanes=128)

# AMD Instinct MI300X data sheet: 304 compute units, 2.1 GHz; its 163.4 TFLOPS of fp32 are packed
# instructions, two FMAs each. AMD CDNA 3 white paper and ISA guide: each of a compute unit's four SIMDs of 16 lanes
# works off a wave of 64 threads in four clocks, and transcendentals at a quarter of that rate; the unit's scalar pipe
# takes a wave's instruction per clock.
_MI300X = Device(
    "MI300X",
    _bytes_per_clock("MI300X", 304, 2.1),
    _tensor_flop_per_clock("MI300X", 304, 2.1),
    # AMD CDNA 3 white paper: 16 channels of 128 bytes for the 38 compute units of a die.
    16 * 128 / 38,
    (
        Pipe("vector", 64, {"fp32": 1, "alu": 1, "special": 4}),
        Pipe("scalar", 64, {"scalar": 1}),
    ),
)


# NVIDIA's limits are in the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; the
# instructions are what PTX's mma.sync (HMMA), wgmma (HGMMA) and tcgen05.mma (UTCHMMA) become.
def _cuda(
    arch: int, kib: int, warps: int, blocks: int, core: str, columns: int = 0, device: Device | None = None
) -> Target:
    """``kib`` is the shared memory of a multiprocessor, of which the runtime keeps one for each block."""
    return Target(
        name=cast(TargetName, f"sm_{arch}"),
        backend="cuda",
        arch=arch,
        warp_size=32,
        shared_per_block=(kib - 1) * _KIB,
        shared=kib * _KIB,
        shared_reserved=_KIB,
        shared_granule=128,
        registers_per_partition=16_384,
        register_granule=256,
        warps=warps,
        blocks=blocks,
        tensor_core=core,
        tensor_memory_columns=columns,
        device=device,
    )


# AMD's limits are those of LLVM's AMDGPU backend: 512 registers for each lane of a SIMD, vector and accumulator
# registers together; on RDNA, where a multiprocessor is a pair of compute units with four SIMDs, 1,536.
def _cdna(name: TargetName, kib: int, granule: int, hazard: Hazard | None, device: Device | None = None) -> Target:
    return Target(
        name=name,
        backend="hip",
        arch=name,
        warp_size=64,
        shared_per_block=kib * _KIB,
        shared=kib * _KIB,
        shared_reserved=0,
        shared_granule=granule,
        registers_per_partition=32_768,
        register_granule=512,
        warps=32,
        blocks=32,
        tensor_core="MFMA",
        hazard=hazard,
        device=device,
    )


def _rdna(name: TargetName, hazard: Hazard | None) -> Target:
    return Target(
        name=name,
        backend="hip",
        arch=name,
        warp_size=32,
        shared_per_block=64 * _KIB,
        shared=128 * _KIB,
        shared_reserved=0,
        shared_granule=1_024,
        registers_per_partition=49_152,
        register_granule=768,
        warps=64,
        blocks=32,
        tensor_core="WMMA",
        hazard=hazard,
    )


TARGETS: dict[TargetName, Target] = {
    target.name: target
    for target in (
        _cuda(80, 164, 64, 32, "HMMA", device=_A100),
        _cuda(86, 100, 48, 16, "HMMA"),
        _cuda(89, 100, 48, 24, "HMMA"),
        _cuda(90, 228, 64, 32, "HGMMA", device=_H100),
        _cuda(100, 228, 64, 32, "UTCHMMA", columns=512),
        _cuda(103, 228, 64, 32, "UTCHMMA", columns=512),
        _cuda(120, 100, 48, 24, "HMMA"),
        _cdna("gfx90a", 64, 512, None),
        _cdna("gfx942", 64, 512, "state", _MI300X),
        _cdna("gfx950", 160, 1_280, "state"),
        _rdna("gfx1100", "result"),
        _rdna("gfx1201", None),
    )
}
