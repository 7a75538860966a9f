"""What the kernels that ran were compiled to."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch

from srpo_kernels.verify.machine import Machine

_MODULES = ("row_stats", "row_mixture", "row_entries", "row_grad", "row_units", "scale", "tile_stats")
_LIMITS = (
    "warp_size", "max_threads_per_multi_processor", "regs_per_multiprocessor", "shared_memory_per_multiprocessor",
)  # fmt: skip


def compiled_kernels(machine: Machine) -> list[dict[str, Any]]:
    """Registers, spilled bytes, shared memory and occupancy of each kernel that this process has launched.

    Nothing in the interpreter; a number that this Triton or this device does not give is None.
    """
    if "triton" not in machine.backends or machine.interpreted:
        return []
    module = torch.get_device_module(machine.device)
    properties = module.get_device_properties(machine.device) if hasattr(module, "get_device_properties") else None
    return [_numbers(name, kernel, properties) for name, kernel in _launched()]


def _launched() -> Iterator[tuple[str, Any]]:
    for name in _MODULES:
        module = importlib.import_module(f"srpo_kernels.kernels.{name}")
        for attribute, function in vars(module).items():
            # A function of the interpreter, or of another module's, has no cache of its own here.
            caches = getattr(function, "device_caches", {}) if attribute.endswith("_kernel") else {}
            for cache in caches.values():
                # Of tuples the first is what was compiled, by its key.
                yield from ((attribute.removesuffix("_kernel"), kernel) for kernel in cache[0].values())


def _numbers(name: str, kernel: Any, properties: Any) -> dict[str, Any]:
    metadata = kernel.metadata
    found = {
        "kernel": name,
        "hash": kernel.hash,
        "warps": metadata.num_warps,
        "shared_bytes": metadata.shared,
        "registers": getattr(kernel, "n_regs", None),
        "spills": getattr(kernel, "n_spills", None),
    }
    return found | {"warps_per_multiprocessor": _resident_warps(found, properties)}


def _resident_warps(kernel: dict[str, Any], properties: Any) -> int | None:
    """Warps of whole programs that fit on a multiprocessor, by its threads, registers and shared memory."""
    limits = [getattr(properties, name, None) for name in _LIMITS]
    if None in limits or not kernel["registers"]:
        return None
    warp_size, threads, registers, shared = limits
    programs = [threads // (warp_size * kernel["warps"])]
    programs.append(registers // (kernel["registers"] * warp_size * kernel["warps"]))
    if kernel["shared_bytes"]:
        programs.append(shared // kernel["shared_bytes"])
    return int(min(programs) * kernel["warps"])
