"""Which backend runs where, and what a caller hears who asks for one that cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from srpo_kernels.engine import backends
from srpo_kernels.engine.backends import resolve_backend
from srpo_kernels.kernels import launch
from srpo_kernels.rows import dtypes

CPU, CUDA, XPU, MPS = map(torch.device, ("cpu", "cuda", "xpu", "mps"))


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        (CPU, torch.float32, "torch"),
        (CUDA, torch.float32, "triton"),
        (XPU, torch.float32, "triton"),
        (MPS, torch.float32, "torch"),
        (CUDA, torch.float64, "torch"),
    ],
    ids=str,
)
def test_auto_is_triton_where_it_compiles_and_logits_are_fp32(
    device: torch.device, dtype: torch.dtype, expected: str
) -> None:
    assert resolve_backend("auto", device, dtype) == expected
    assert resolve_backend("torch", device, dtype) == "torch"


def test_triton_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_backend("triton", CUDA, torch.float32) == "triton"
    with pytest.raises(ValueError, match=r"computes in float32, got inputs of torch\.float64"):
        resolve_backend("triton", CUDA, torch.float64)
    monkeypatch.setattr(launch, "INTERPRETED", True)
    assert resolve_backend("triton", CPU, torch.float32) == "triton"
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"backend='triton' needs a GPU, got tensors on cpu.*TRITON_INTERPRET=1"):
        resolve_backend("triton", CPU, torch.float32)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_TRITON_INSTALLED", False)
    assert resolve_backend("auto", CUDA, torch.float32) == "torch"
    with pytest.raises(ValueError, match="needs the package triton, which is not installed"):
        resolve_backend("triton", CUDA, torch.float32)


_CALL = """
import sys, torch
import srpo_kernels as sk
hidden, weight = torch.randn(4, 8), torch.randn(33, 8)
call = dict(target_ids=torch.zeros(4, dtype=torch.int64), advantages=torch.ones(4))
sk.srpo_loss(hidden, weight, **call)
print("triton" in sys.modules)
try:
    sk.srpo_loss(hidden, weight, **call, backend="triton")
except ValueError as error:
    print(error)
"""


_BROKEN = """
import torch, srpo_kernels as sk
from srpo_kernels.engine import backends
call = dict(hidden=torch.randn(4, 8), weight=torch.randn(33, 8), target_ids=torch.zeros(4, dtype=torch.int64))
print(sk.token_stats(**call).log_probs.shape == (4,))
# What a GPU would be told.
backends._TRITON_DEVICES = ("cpu",)
for backend in ("triton", "auto"):
    for function in (sk.token_stats, lambda **call: sk.srpo_loss(**call, advantages=torch.ones(4))):
        try:
            function(**call, backend=backend)
        except ValueError as error:
            print(error)
"""


@pytest.mark.parametrize("line", ["raise ImportError('libtriton.so: no such symbol')", "import nothing_of_this_name"])
def test_an_installation_that_cannot_be_imported_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text(line)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    run = subprocess.run([sys.executable, "-c", _BROKEN], env=environment, capture_output=True, text=True, check=True)
    first, *errors = run.stdout.splitlines()
    assert first == "True"
    assert len(errors) == 4
    for error in errors:
        assert error.startswith("backend='triton', which 'auto' is on a GPU, needs the package triton, whose import")
        assert "libtriton.so: no such symbol" in error or "No module named 'nothing_of_this_name'" in error
        assert error.endswith("use backend='torch'")


def test_the_torch_backend_leaves_triton_alone_and_a_cpu_without_the_interpreter_refuses_it() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", _CALL], env=environment, capture_output=True, text=True, check=True)
    imported, message = run.stdout.splitlines()
    assert imported == "False"
    assert message.startswith("backend='triton' needs a GPU, got tensors on cpu")


def test_a_device_without_fp64_computes_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    # Intel's Arc has none, their data-center GPUs do.
    properties = {"xpu:0": SimpleNamespace(has_fp64=False), "xpu:1": SimpleNamespace(has_fp64=True)}
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: properties[str(device)])
    dtypes._xpu_has_fp64.cache_clear()
    wide = {name: dtypes.wide_dtype(torch.device(name)) for name in ("cpu", "cuda", "mps", "xpu:0", "xpu:1")}
    dtypes._xpu_has_fp64.cache_clear()
    assert [name for name, dtype in wide.items() if dtype == torch.float32] == ["mps", "xpu:0"]
    assert wide["cpu"] == wide["cuda"] == wide["xpu:1"] == torch.float64
