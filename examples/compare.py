"""The fused loss beside the naive one, which holds full logits, on one batch: errors, time, peak memory."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import reference
import srpo_kernels as sk

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {"fused": sk.srpo_loss, "naive": reference.srpo_loss}
ROUNDS = 3
STATUS = Path("/proc/self/status")


def loss_and_gradients(name: str, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and its gradients for hidden and weight, as leaves of their own."""
    hidden = inputs["hidden"].detach().requires_grad_()
    weight = inputs["weight"].detach().requires_grad_()
    out = IMPLEMENTATIONS[name](**(inputs | {"hidden": hidden, "weight": weight}))
    out.loss.backward()
    return out.loss.detach(), hidden.grad, weight.grad


def compare_with_naive(inputs: dict[str, Any]) -> str:
    """One line. Times are the best of a few rounds in turn; each peak is that of a process of its own."""
    inputs = {key: value.detach() if isinstance(value, Tensor) else value for key, value in inputs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    results = {}
    for _ in range(ROUNDS):
        for name in IMPLEMENTATIONS:
            start = time.perf_counter()
            results[name] = loss_and_gradients(name, inputs)
            seconds[name].append(time.perf_counter() - start)
    (loss, *gradients), (naive_loss, *naive_gradients) = results["fused"], results["naive"]
    loss_error = relative_error(loss, naive_loss)
    gradient_error = max(map(relative_error, gradients, naive_gradients))
    fused, naive = (min(seconds[name]) for name in ("fused", "naive"))
    line = (
        f"fused against naive loss, last batch ({inputs['mask'].sum():,} tokens, {len(inputs['weight']):,} words): "
        f"loss error {loss_error:.1e}, gradient error {gradient_error:.1e}, "
        f"time {fused / naive:.2f}x ({fused:.2f} s / {naive:.2f} s)"
    )
    if not STATUS.exists():
        return line + ", peak memory not measured here"
    fused_peak, naive_peak = (measure_peak(name, inputs) for name in ("fused", "naive"))
    return line + f", peak memory {fused_peak / max(naive_peak, 1e-3):.2f}x ({fused_peak:.0f} MB / {naive_peak:.0f} MB)"


def relative_error(value: Tensor, expected: Tensor) -> float:
    """``‖value - expected‖ / ‖expected‖``, 0 where both are 0."""
    error = torch.linalg.vector_norm(value - expected)
    return (error / torch.linalg.vector_norm(expected)).item() if error else 0.0


def measure_peak(name: str, inputs: dict[str, Any]) -> float:
    """Extra peak memory of forward and backward in MB, in a fresh process: allocators keep what they once had."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inputs.pt"
        torch.save(inputs | {"threads": torch.get_num_threads()}, path)
        command = [sys.executable, "-m", "examples.compare", name, str(path)]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, check=True, capture_output=True, text=True)
    return float(done.stdout)


def print_peak(name: str, path: str) -> None:
    """The child's part. The tiny call before brings up thread pools and code that are no part of the loss."""
    # The file is the parent's own, and holds a config.
    inputs = torch.load(path, weights_only=False)
    torch.set_num_threads(inputs.pop("threads"))
    tiny = torch.zeros(1, 1, 1)
    config = inputs["config"]
    loss_and_gradients(
        name,
        {
            "hidden": tiny,
            "weight": tiny[0],
            "target_ids": torch.zeros(1, 1, dtype=torch.long),
            "advantages": torch.ones(1),
            "config": config,
        },
    )
    before = status_mb("VmRSS")
    loss_and_gradients(name, inputs)
    print(status_mb("VmHWM") - before)


def status_mb(field: str) -> float:
    """A field of this process's status, which the kernel gives in KiB."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024 / 1e6


if __name__ == "__main__":
    print_peak(*sys.argv[1:])
