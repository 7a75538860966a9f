"""What there is to verify: the device, the versions, the backends and dtypes that run on it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

import srpo_kernels
from srpo_kernels.engine.backends import BackendName, resolve_backend, rows_of
from srpo_kernels.engine.gemm import mixed_products
from srpo_kernels.verify.checks import dtype_name

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_BACKENDS: tuple[BackendName, ...] = ("torch", "triton")
_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Machine:
    """``backends`` and ``dtypes`` run here; ``absent`` says of each of the others why not.

    ``interpreted``: the triton backend runs in Triton's interpreter. ``products`` says how logits, dX and
    dW are multiplied.
    """

    device: torch.device
    device_name: str
    versions: dict[str, str]
    interpreted: bool
    backends: tuple[BackendName, ...]
    dtypes: tuple[torch.dtype, ...]
    absent: dict[str, str]
    products: dict[str, str]

    def dtypes_of(self, backend: BackendName) -> tuple[torch.dtype, ...]:
        """The dtypes that a backend takes."""
        return self.dtypes if backend == "torch" else tuple(x for x in self.dtypes if x != torch.float64)


def inspect(device_name: str | None, backend: str) -> Machine:
    """This machine's ``device_name``, its accelerator where None, under ``backend``, or every one where ``"auto"``."""
    device = torch.device(device_name) if device_name else torch.accelerator.current_accelerator(check_available=True)
    device = device or torch.device("cpu")
    wanted = [name for name in _BACKENDS if backend in ("auto", name)]
    obstacles = {name: _obstacle(name, device) for name in wanted}
    missing = {dtype_name(dtype): _missing(dtype, device) for dtype in DTYPES}
    absent = {name: reason for name, reason in (obstacles | missing).items() if reason is not None}
    absent |= {name: "not asked for" for name in _BACKENDS if name not in wanted}
    usable = missing["fp32"] is None
    backends = tuple(name for name in wanted if usable and name not in absent)
    return Machine(
        device,
        _device_name(device) if usable else device.type,
        _versions(),
        "triton" in backends and _interpreted(),
        backends,
        tuple(dtype for dtype in DTYPES if dtype_name(dtype) not in absent),
        absent,
        _products(device, [dtype for dtype in DTYPES if dtype_name(dtype) not in absent]),
    )


def _obstacle(backend: BackendName, device: torch.device) -> str | None:
    try:
        rows_of(resolve_backend(backend, device, torch.float32))
    except Exception as reason:
        return str(reason)
    return None


def _interpreted() -> bool:
    from srpo_kernels.kernels import launch

    return launch.INTERPRETED


def _missing(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why ``device`` cannot multiply in ``dtype``; Apple's has no fp64, nor have some of Intel's."""
    try:
        x = torch.ones(4, 4, device=device, dtype=dtype)
        (x @ x).cpu()
    except Exception as reason:
        return str(reason).strip().splitlines()[0]
    return None


_PRODUCTS = {
    "addmm": "{0} operands with an fp32 result, added to dW in the same product",
    "mm": "{0} operands with an fp32 result, added to dW in blocks of 32 MiB",
    "none": "{0} weights are widened to fp32, 32 MiB at a time",
}


def _products(device: torch.device, dtypes: list[torch.dtype]) -> dict[str, str]:
    """By the name of a weight's dtype; of fp32 the precision that torch is set to, which plain torch has as well."""
    found = {}
    for dtype in dtypes:
        name = dtype_name(dtype)
        if dtype in (torch.bfloat16, torch.float16):
            found[name] = _PRODUCTS[mixed_products(device, dtype)].format(name)
            if dtype == torch.float16 and "operands" in found[name]:
                found[name] = "fp16 operands with an fp32 result for logits; dX and dW from fp32"
        elif dtype == torch.float32:
            precision = torch.get_float32_matmul_precision()
            exact = device.type == "cpu" or precision == "highest"
            found[name] = "fp32" if exact else f"TF32 or less (torch.set_float32_matmul_precision({precision!r}))"
    return found


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.exists() else []
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"
    module = torch.get_device_module(device)
    return str(module.get_device_name(device)) if hasattr(module, "get_device_name") else device.type


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for runtime in ("cuda", "hip", "xpu"):
        if getattr(torch.version, runtime, None):
            versions[runtime] = str(getattr(torch.version, runtime))
    try:
        versions["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        versions["triton"] = "not installed" if importlib.util.find_spec("triton") is None else "not packaged"
    return versions | {"srpo_kernels": srpo_kernels.__version__}
