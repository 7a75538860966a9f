"""How the kernels are launched: static configurations, each with its reason.

Nothing is tuned at run time: ``row_grad`` overwrites its input, and a choice that depends on a measurement would change
the order of a sum from run to run.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import triton
from torch import Tensor

from srpo_kernels.kernels.row_stats import row_stats_kernel
from srpo_kernels.rows.mixture import Mixture

# AMD's data-center GPUs, whose warps have 64 threads, and its others, whose warps have 32.
Vendor = Literal["nvidia", "cdna", "rdna", "other"]


def check_interpreter(triton_version: str, numpy_version: str) -> None:
    """Raise ImportError where Triton's interpreter does not run with this NumPy."""

    def minor(version: str) -> list[int]:
        return [int(part) for part in version.split(".")[:2]]

    # It makes Python numbers of arrays that have one element and a dimension.
    if minor(triton_version) < [3, 7] and minor(numpy_version) >= [2, 4]:
        raise ImportError(
            f"TRITON_INTERPRET=1: the interpreter of triton {triton_version} does not run with numpy {numpy_version}; "
            "install triton>=3.7 or numpy<2.4"
        )


# Kernels are functions of numpy where TRITON_INTERPRET was set when triton was imported.
INTERPRETED = not isinstance(row_stats_kernel, triton.JITFunction)
if INTERPRETED:
    import numpy

    check_interpreter(triton.__version__, numpy.__version__)

# Eight programs fill a multiprocessor of 2048 threads.
_ROW_THREADS = 256
# A thread has four 16-byte loads in flight: of one model's row, or two of each model's.
_ROW_LANES = 4 * _ROW_THREADS
# A turn's tiles, of which a thread has four.
MERGE_TILES = 4 * _ROW_THREADS


@dataclass(frozen=True)
class RowLaunch:
    """One program per row: ``lanes`` 16-byte vectors of each of its rows at a time."""

    lanes: int
    num_warps: int
    # The loop has no product whose operands could be fetched ahead.
    num_stages: int = 1

    @property
    def options(self) -> dict[str, int | bool]:
        """What Triton is told at a launch."""
        return launch_options(self.num_warps, self.num_stages)


@dataclass(frozen=True)
class TileLaunch:
    """One program per tile of logits."""

    block_rows: int
    block_vocab: int
    block_hidden: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int | bool]:
        """What Triton is told at a launch."""
        return launch_options(self.num_warps, self.num_stages)


def launch_options(num_warps: int, num_stages: int) -> dict[str, int | bool]:
    """What Triton is told at a launch."""
    # Multiply-adds are one instruction: Triton 3.10 no longer makes them unasked.
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


def row_launch(models: int, vendor: Vendor) -> RowLaunch:
    """The row passes over one model's logits, or over two models'."""
    return RowLaunch(_ROW_LANES // models, _row_warps(vendor))


def merge_launch(vendor: Vendor) -> RowLaunch:
    """The sums of a row's tiles, of one model or of two."""
    return RowLaunch(MERGE_TILES, _row_warps(vendor))


def elements_launch() -> RowLaunch:
    """What is computed element by element, side by side in memory."""
    return RowLaunch(_ROW_LANES, 4)


def _row_warps(vendor: Vendor) -> int:
    return _ROW_THREADS // (64 if vendor == "cdna" else 32)


def tile_launch(models: int, dtype: torch.dtype, vendor: Vendor, capability: int) -> TileLaunch:
    """The tiles of one model, or of two side by side; ``capability`` is NVIDIA's major version.

    Operands below fp32 go through tensor cores. Where those keep their sums in few registers of their own, two tiles of
    full width would spill: Ampere, Ada, consumer Blackwell, AMD.
    """
    if dtype == torch.float32:
        # Two tiles of 64 rows under a softcap spill on Blackwell.
        rows = 32 if models == 2 and vendor == "nvidia" and capability == 10 else 64
        return TileLaunch(rows, 64 // models, 16, num_warps=2 if vendor == "cdna" else 4, num_stages=2)
    amd = vendor in ("cdna", "rdna")
    # Nor has RDNA 3 the registers for one of them.
    narrow = vendor == "rdna" or (models == 2 and (amd or capability in (8, 12)))
    # On Hopper one tile has the registers for twice the width: 17 % faster on an H100 at H = 4,096.
    wide = vendor == "nvidia" and capability == 9 and models == 1
    return TileLaunch(128, 64 if narrow else 256 if wide else 128, 64, num_warps=8, num_stages=2 if amd else 3)


def vendor_of(device: torch.device) -> Vendor:
    """Whose GPU ``device`` is; "other" in the interpreter."""
    if INTERPRETED or device.type != "cuda":
        return "other"
    if not torch.version.hip:
        return "nvidia"
    return "cdna" if torch.cuda.get_device_properties(device).warp_size == 64 else "rdna"


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    if tensor.device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)  # type: ignore[no-any-return]


def gradient_terms(
    mixture: Mixture | None, *, forward_kl: bool = False, reverse_kl: bool = False, entries: bool = False
) -> dict[str, bool]:
    """Which terms of divergences a gradient has."""
    terms = mixture_terms(mixture)
    return {
        "FORWARD_KL": forward_kl,
        "REVERSE_KL": reverse_kl,
        "STUDENT_KL": terms["STUDENT_KL"],
        "OVERLAP": terms["OVERLAP"],
        "ENTRIES": entries,
    }


def mixture_terms(mixture: Mixture | None) -> dict[str, bool]:
    """Which terms of a mixture the divergence and its gradient have: compile-time values, the same for any alpha."""
    return {
        "STUDENT_KL": mixture is not None and mixture.student_weight != 0,
        "TEACHER_KL": mixture is not None and mixture.teacher_weight != 0,
        "OVERLAP": mixture is not None and mixture.ratio != 0,
    }
