"""Time and memory of forward and backward beside plain torch, on a batch that suits the device."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import srpo_kernels
from srpo_kernels import SRPOConfig
from srpo_kernels.engine.backends import BackendName
from srpo_kernels.verify import plain
from srpo_kernels.verify.rounds import Rounds, interleave

PLAIN = "plain torch"
WORKLOADS = ("policy", "distillation", "routed")

_LENGTH = 16
_ROUNDS = 5
# What plain torch keeps for the backward of the divergence, per logit, with something to spare.
_PLAIN_BYTES = 80
_FEWEST_ROWS, _MOST_ROWS = 128, 4096

Step = Callable[[], object]


class Shape(NamedTuple):
    """What is timed: ``rows`` response positions, LM head ``[vocab_size, hidden_size]``, the model's dtype."""

    rows: int
    vocab_size: int
    hidden_size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Timing:
    """Forward and backward of one implementation: the median time and the extra peak memory.

    ``note`` says why a number is missing; ``failed``, that the library is to blame.
    """

    workload: str
    implementation: str
    milliseconds: float | None = None
    peak_mib: float | None = None
    note: str | None = None
    failed: bool = False


def shape_for(device: torch.device, dtypes: Sequence[torch.dtype]) -> Shape:
    """As many rows as plain torch has memory for, of a current model's head; on a CPU a small problem."""
    if device.type == "cpu":
        return Shape(256, 32_768, 256, torch.float32)
    dtype = torch.bfloat16 if torch.bfloat16 in dtypes else torch.float32
    free = free_bytes(device)
    vocab_size = 151_936 if free > 2 * _PLAIN_BYTES * 151_936 * _FEWEST_ROWS else 32_768
    fitting = max(free // (2 * _PLAIN_BYTES * vocab_size), _FEWEST_ROWS)
    return Shape(min(1 << int(math.log2(fitting)), _MOST_ROWS), vocab_size, 2048, dtype)


def free_bytes(device: torch.device) -> int:
    """Free memory of an accelerator; 4 GiB where it does not say."""
    module = torch.get_device_module(device)
    if hasattr(module, "empty_cache"):
        module.empty_cache()
    return int(module.mem_get_info(device)[0]) if hasattr(module, "mem_get_info") else 4 << 30


def measure(device: torch.device, shape: Shape, backends: Sequence[BackendName]) -> Iterator[Timing]:
    """Plain torch and the library on every backend, on each workload."""
    for workload in WORKLOADS:
        inputs = _make_inputs(workload, shape, device)
        steps: dict[str, Step] = {PLAIN: partial(_step, plain.srpo_loss, inputs)}
        for backend in backends:
            steps[backend] = partial(_step, partial(_library_loss, backend), inputs)
        yield from _measure(workload, steps, [x for x in inputs.values() if isinstance(x, Tensor)], device)


def _make_inputs(workload: str, shape: Shape, device: torch.device) -> dict[str, Any]:
    """Sequences of random states; a fifth of the routed batch is padding, two fifths of its sequences distilled."""
    sequences = shape.rows // _LENGTH
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device, dtype=shape.dtype)

    hidden = normal(sequences, _LENGTH, shape.hidden_size) * (2.0 / math.sqrt(shape.hidden_size))
    numbers = torch.arange(sequences, device=device)
    advantages = torch.where(numbers % 2 == 0, 1.0, -1.0)
    mask = torch.ones(sequences, _LENGTH, dtype=torch.bool, device=device)
    sdpo_mask = torch.full_like(numbers, workload == "distillation", dtype=torch.bool)
    if workload == "routed":
        sdpo_mask = numbers % 5 < 2
        advantages = advantages * (numbers % 5 != 2)
        mask = mask & (torch.arange(_LENGTH, device=device) < _LENGTH - 2 * (numbers % 4)[:, None])
    return {
        "hidden": hidden.requires_grad_(),
        "weight": normal(shape.vocab_size, shape.hidden_size).requires_grad_(),
        "target_ids": torch.randint(
            shape.vocab_size, (sequences, _LENGTH), generator=generator, device=device, dtype=torch.int64
        ),
        "advantages": advantages,
        "mask": mask,
        "sdpo_mask": sdpo_mask,
        "teacher_hidden": hidden.detach() + 0.5 * normal(*hidden.shape) / math.sqrt(shape.hidden_size),
        "config": SRPOConfig(),
    }


def _library_loss(backend: BackendName, **inputs: Any) -> Tensor:
    return srpo_kernels.srpo_loss(**inputs, backend=backend).loss


def _step(loss: Callable[..., Tensor], inputs: dict[str, Any]) -> object:
    return torch.autograd.grad(loss(**inputs), [inputs["hidden"], inputs["weight"]])


def _measure(workload: str, steps: Mapping[str, Step], inputs: list[Tensor], device: torch.device) -> Iterator[Timing]:
    """Warm up and meter each step alone, then let those that ran take turns, each round from another one on."""
    peaks: dict[str, float | None] = {}
    for name, step in steps.items():
        try:
            step()
            peaks[name] = peak_mib(step, inputs, device)
        except Exception as reason:
            # Plain torch may well run out of memory: that is no fault of the library's.
            yield Timing(workload, name, note=f"{type(reason).__name__}: {reason}", failed=name != PLAIN)
    seconds = interleave({name: steps[name] for name in peaks}, Rounds(_ROUNDS, math.inf), device, lambda _: None)
    for name, times in seconds.items():
        note = "this device does not meter memory" if peaks[name] is None else None
        yield Timing(workload, name, 1e3 * statistics.median(times), peaks[name], note)


def peak_mib(step: Step, inputs: list[Tensor], device: torch.device) -> float | None:
    """What a step allocates beside its inputs; its results are a part of it."""
    srpo_kernels.release_workspace()
    if device.type == "cpu":
        with MemoryMeter(*inputs) as meter:
            step()
        return float(meter.peak) / 2**20
    module = torch.get_device_module(device)
    if not hasattr(module, "max_memory_allocated"):
        return None
    torch.accelerator.synchronize(device)
    module.reset_peak_memory_stats(device)
    before = module.memory_allocated(device)
    step()
    torch.accelerator.synchronize(device)
    extra: int = module.max_memory_allocated(device) - before
    return extra / 2**20


class MemoryMeter(TorchDispatchMode):
    """The most bytes that were alive at a time of what was allocated inside, and the largest allocation.

    A CPU's allocator does not count.
    """

    def __init__(self, *known: Tensor | None) -> None:
        super().__init__()
        self._known = {StorageWeakRef(x.untyped_storage()) for x in known if x is not None}
        self._alive: dict[StorageWeakRef, int] = {}
        self.peak: int = 0
        self.largest: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = StorageWeakRef(tensor.untyped_storage())
                if storage not in self._known:
                    self._alive[storage] = tensor.untyped_storage().nbytes()
                    self.largest = max(self.largest, self._alive[storage])
        self._alive = {storage: size for storage, size in self._alive.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self._alive.values()))
        return result
