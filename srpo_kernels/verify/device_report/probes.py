"""What the device does with this library's matmuls, and with its passes over rows of logits."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from srpo_kernels.engine import gemm
from srpo_kernels.engine.backends import BackendName, rows_of
from srpo_kernels.engine.workspace import borrowed, row_stride
from srpo_kernels.rows.contract import RowGradients, Statistics
from srpo_kernels.rows.passes import Request, RowPasses
from srpo_kernels.rows.spec import RowSpec
from srpo_kernels.rows.vocabulary import Vocabulary
from srpo_kernels.verify.checks import dtype_name
from srpo_kernels.verify.device_report.sizes import Sizes
from srpo_kernels.verify.machine import Machine
from srpo_kernels.verify.roofline import pass_bytes
from srpo_kernels.verify.rounds import Clock

_REPEATS = 7
# Kinds of rows: a name, and what is computed of the models.
KINDS = {"policy": RowSpec(), "reverse_kl": RowSpec(divergence="reverse_kl"), "jsd": RowSpec(divergence="jsd")}


def products(machine: Machine, sizes: Sizes) -> dict[str, Any]:
    """How logits, dX and dW are multiplied in each dtype, their TFLOP/s with an fp32 result, and the memory's GB/s."""
    clock, rates = Clock(machine.device), []
    for dtype in machine.dtypes:
        if dtype == torch.float64:
            continue
        for vocab_size, hidden_size in sizes.heads:
            weight = torch.randn(vocab_size, hidden_size, device=machine.device).to(dtype)
            for rows in sizes.chunks:
                rates.append(_rates(clock, weight, rows))
    source = torch.zeros(sizes.copied_bytes, dtype=torch.int8, device=machine.device)
    copy = torch.empty_like(source)
    seconds = _median(clock, lambda: copy.copy_(source))
    return {"answers": machine.products, "copy_bytes_per_second": 2 * source.nbytes / seconds, "rates": rates}


def _rates(clock: Clock, weight: Tensor, rows: int) -> dict[str, Any]:
    """FLOP per second of each product of a chunk."""
    (vocab_size, hidden_size), device = weight.shape, weight.device
    flop = 2.0 * rows * vocab_size * hidden_size
    operand = torch.randn(rows, hidden_size, device=device).to(gemm.operand_dtype(weight, torch.float32))
    gradient = gemm.HeadGradient(weight, None, torch.float32)
    grad_hidden = torch.empty(rows, hidden_size, device=device)
    with borrowed(rows, vocab_size, torch.float32, device) as logits:
        seconds = {"logits": _median(clock, lambda: gemm.project(operand, weight, None, logits))}
        dlogits = logits.to(gemm.dlogits_dtype(weight, torch.float32))
        seconds["dX"] = _median(clock, lambda: gemm.backproject(dlogits, weight, grad_hidden))
        # To warm up it runs once more: what is timed adds to dW.
        seconds["dW"] = _median(clock, lambda: gradient.add_weight(dlogits, operand))
    return {
        "dtype": dtype_name(weight.dtype),
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "rows": rows,
        "flop_per_second": {name: flop / x for name, x in seconds.items()},
    }


def row_passes(machine: Machine, sizes: Sizes) -> list[dict[str, Any]]:
    """Bytes per second of statistics and gradient of each kind of row, by the bytes that the kernels have to move."""
    bf16 = torch.bfloat16 in machine.dtypes and machine.device.type != "cpu"
    dtype = torch.bfloat16 if bf16 else torch.float32
    found = []
    for backend in machine.backends:
        for vocab_size in sorted({vocab_size for vocab_size, _ in sizes.heads}):
            for kind, spec in KINDS.items():
                found.append(pass_rates(machine.device, backend, vocab_size, sizes.pass_rows, kind, spec, dtype))
    return found


def pass_rates(
    device: torch.device, backend: BackendName, vocab_size: int, rows: int, kind: str, spec: RowSpec, dtype: torch.dtype
) -> dict[str, Any]:
    """Bytes per second of statistics and gradient of rows of a ``kind``, with dlogits in ``dtype``."""
    passes, clock, taught = RowPasses(rows_of(backend), Vocabulary.whole(vocab_size)), Clock(device), kind != "policy"
    buffers = [torch.empty(rows, row_stride(vocab_size), device=device)[:, :vocab_size] for _ in range(1 + taught)]
    out = buffers[0] if dtype == buffers[0].dtype else torch.empty_like(buffers[0], dtype=dtype)
    ones = torch.ones(rows, device=device)
    gradients = RowGradients(divergence=ones) if taught else RowGradients(log_probs=ones)
    request = Request(
        buffers[0],
        buffers[1] if taught else None,
        spec,
        torch.randint(vocab_size, (rows,), device=device),
        gradient=gradients.names,
    )
    times: dict[str, list[float]] = {"statistics": [], "gradient": []}
    for _ in range(_REPEATS + 1):
        for x in buffers:
            # Passes may write over what they read.
            x.normal_()
        found: list[Statistics] = []
        times["statistics"].append(clock.seconds(partial(_reduce, passes, request, found)))
        times["gradient"].append(clock.seconds(partial(passes.dlogits_, request, found[0], gradients, out=out)))
    moved = pass_bytes(taught, spec, dtype.itemsize)
    gradient = moved.pop("row_grad")
    elements = rows * vocab_size
    return {
        "backend": backend,
        "kind": kind,
        "vocab_size": vocab_size,
        "rows": rows,
        # The first run compiles.
        "bytes_per_second": {
            "statistics": elements * sum(moved.values()) / statistics.median(times["statistics"][1:]),
            "gradient": elements * gradient / statistics.median(times["gradient"][1:]),
        },
    }


def _reduce(passes: RowPasses, request: Request, found: list[Statistics]) -> None:
    found += passes.statistics(request)


def _median(clock: Clock, step: Callable[[], object]) -> float:
    """Seconds, after a run to warm up."""
    step()
    return statistics.median(clock.seconds(step) for _ in range(_REPEATS))
