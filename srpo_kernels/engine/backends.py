"""Which backend runs where."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from srpo_kernels.rows import torch_rows
from srpo_kernels.rows.contract import Rows

BackendName = Literal["torch", "triton"]

_TRITON_DEVICES = ("cuda", "xpu")
# Found, not imported: that is left to the first call that wants it.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> BackendName:
    """The backend that ``"auto"``, ``"torch"`` or ``"triton"`` means on ``device``, for logits in ``dtype``.

    Triton wherever it compiles for the device and logits are fp32; torch elsewhere. Raises ValueError where Triton was
    asked for and cannot run. An installation that cannot be imported is an error of ``"auto"`` too, of the call that
    wants it: torch in its place would be slow without a word.
    """
    if backend == "torch":
        return "torch"
    if backend == "auto":
        usable = device.type in _TRITON_DEVICES and dtype == torch.float32
        return "triton" if usable and _TRITON_INSTALLED else "torch"
    if not _TRITON_INSTALLED:
        raise ValueError("backend='triton' needs the package triton, which is not installed; use 'auto' or 'torch'")
    if dtype != torch.float32:
        raise ValueError(f"backend='triton' computes in float32, got inputs of {dtype}; use 'auto' or 'torch'")
    if device.type not in _TRITON_DEVICES and not _interpreted():
        raise ValueError(
            f"backend='triton' needs a GPU, got tensors on {device}; use 'auto' or 'torch', or set TRITON_INTERPRET=1 "
            "before triton is first imported to run the kernels in its interpreter"
        )
    return "triton"


def rows_of(backend: str) -> Rows:
    """The rows of a backend that ``resolve_backend`` returned; triton is imported for its own alone."""
    if backend == "torch":
        return torch_rows
    with _importing_triton():
        from srpo_kernels.kernels import rows
    return rows


def _interpreted() -> bool:
    with _importing_triton():
        from srpo_kernels.kernels import launch
    return launch.INTERPRETED


@contextmanager
def _importing_triton() -> Iterator[None]:
    try:
        yield
    # Whatever an installation that does not fit this machine or this torch raises.
    except Exception as error:
        raise ValueError(
            "backend='triton', which 'auto' is on a GPU, needs the package triton, whose import failed: "
            f"{type(error).__name__}: {error}; repair it, or use backend='torch'"
        ) from error
