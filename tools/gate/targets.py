"""The devices that the kernels are compiled for, and the data-sheet numbers that their machine code is held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

# What an instruction occupies. On NVIDIA `fp32` is the FMA pipe, where integer multiply-adds run too, and `alu` the
# integer pipe, where compares, minima, selects and conversions run too; on AMD they are the vector instructions on fp32
# and on anything else. `special` is exp2, log2, reciprocal and their like, `scalar` what a warp computes once for all
# its lanes.
Kind = Literal["fp32", "alu", "special", "scalar", "memory", "control"]
KINDS: tuple[Kind, ...] = get_args(Kind)

TargetName = Literal["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"]

# Memory has to be what limits a row pass: at most this much of its time in the busiest pipe, which leaves room for what
# a count of instructions does not see.
ISSUE_RATIO = 0.7
# A softcap's tanh is two more special functions per logit and, for logits near 0 to keep their relative accuracy, a
# polynomial. Few models want it; on an MI300X it makes jsd's statistics a tenth slower than their memory.
SOFTCAP_ISSUE_RATIO = 1.1

_KIB = 1024


@dataclass(frozen=True)
class Pipe:
    """An execution resource of a multiprocessor: threads per clock, and slots that an instruction of a kind takes."""

    name: str
    lanes: int
    slots: Mapping[Kind, int]


@dataclass(frozen=True)
class Device:
    """A product's peak rates, each of one multiprocessor (AMD: compute unit)."""

    name: str
    bytes_per_clock: float
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


def _nvidia(name: str, *, multiprocessors: int, ghz: float, gigabytes_per_second: float, fp32_lanes: int) -> Device:
    """A data-sheet's clock and bandwidth with the SM's rates.

    Those are results per clock and SM in the CUDA C++ Programming Guide, "Throughput of Native Arithmetic
    Instructions", compute capabilities 8.0 and 9.0: fp32 add, multiply and multiply-add 64 and 128; integer add, shift,
    logic, compare, minimum and maximum 64; rcp, rsqrt, ex2, lg2 16. The four schedulers of an SM issue one warp's
    instruction each per clock.
    """
    return Device(
        name,
        gigabytes_per_second / ghz / multiprocessors,
        (
            Pipe("issue", 128, dict.fromkeys(KINDS, 1)),
            Pipe("fp32", fp32_lanes, {"fp32": 1}),
            Pipe("alu", 64, {"alu": 1}),
            Pipe("special", 16, {"special": 1}),
        ),
    )


# NVIDIA A100 data sheet, SXM, 80 GB: 2,039 GB/s; 19.5 TFLOPS of fp32 are 108 SMs x 64 FMAs at 1.41 GHz.
_A100 = _nvidia("A100", multiprocessors=108, ghz=1.41, gigabytes_per_second=2_039, fp32_lanes=64)

# NVIDIA H100 data sheet, SXM: 3.35 TB/s; 67 TFLOPS of fp32 are 132 SMs x 128 FMAs at 1.98 GHz.
_H100 = _nvidia("H100", multiprocessors=132, ghz=1.98, gigabytes_per_second=3_350, fp32_lanes=128)

# AMD Instinct MI300X data sheet: 5.3 TB/s, 304 compute units, 2.1 GHz; its 163.4 TFLOPS of fp32 are packed
# instructions, two FMAs each. AMD CDNA 3 white paper and ISA guide: each of a compute unit's four SIMDs of 16 lanes
# works off a wave of 64 threads in four clocks, and transcendentals at a quarter of that rate; the unit's scalar pipe
# takes a wave's instruction per clock.
_MI300X = Device(
    "MI300X",
    5_300 / 2.1 / 304,
    (
        Pipe("vector", 64, {"fp32": 1, "alu": 1, "special": 4}),
        Pipe("scalar", 64, {"scalar": 1}),
    ),
)


# NVIDIA's limits are in the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; the
# instructions are what PTX's mma.sync (HMMA), wgmma (HGMMA) and tcgen05.mma (UTCHMMA) become. AMD's limits are those of
# LLVM's AMDGPU backend: 512 registers for each lane of a SIMD, vector and accumulator registers together.
TARGETS: dict[TargetName, Target] = {
    target.name: target
    for target in (
        Target(
            name="sm_80",
            backend="cuda",
            arch=80,
            warp_size=32,
            shared_per_block=163 * _KIB,
            shared=164 * _KIB,
            shared_reserved=1 * _KIB,
            shared_granule=128,
            registers_per_partition=16_384,
            register_granule=256,
            warps=64,
            blocks=32,
            tensor_core="HMMA",
            device=_A100,
        ),
        Target(
            name="sm_90",
            backend="cuda",
            arch=90,
            warp_size=32,
            shared_per_block=227 * _KIB,
            shared=228 * _KIB,
            shared_reserved=1 * _KIB,
            shared_granule=128,
            registers_per_partition=16_384,
            register_granule=256,
            warps=64,
            blocks=32,
            tensor_core="HGMMA",
            device=_H100,
        ),
        Target(
            name="sm_100",
            backend="cuda",
            arch=100,
            warp_size=32,
            shared_per_block=227 * _KIB,
            shared=228 * _KIB,
            shared_reserved=1 * _KIB,
            shared_granule=128,
            registers_per_partition=16_384,
            register_granule=256,
            warps=64,
            blocks=32,
            tensor_core="UTCHMMA",
            tensor_memory_columns=512,
        ),
        Target(
            name="sm_120",
            backend="cuda",
            arch=120,
            warp_size=32,
            shared_per_block=99 * _KIB,
            shared=100 * _KIB,
            shared_reserved=1 * _KIB,
            shared_granule=128,
            registers_per_partition=16_384,
            register_granule=256,
            warps=48,
            blocks=24,
            tensor_core="HMMA",
        ),
        Target(
            name="gfx942",
            backend="hip",
            arch="gfx942",
            warp_size=64,
            shared_per_block=64 * _KIB,
            shared=64 * _KIB,
            shared_reserved=0,
            shared_granule=512,
            registers_per_partition=32_768,
            register_granule=512,
            warps=32,
            blocks=32,
            tensor_core="MFMA",
            device=_MI300X,
        ),
        Target(
            name="gfx950",
            backend="hip",
            arch="gfx950",
            warp_size=64,
            shared_per_block=160 * _KIB,
            shared=160 * _KIB,
            shared_reserved=0,
            shared_granule=1_280,
            registers_per_partition=32_768,
            register_granule=512,
            warps=32,
            blocks=32,
            tensor_core="MFMA",
        ),
    )
}
