"""Which checks a machine gets: every case in every dtype on every backend that takes it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from srpo_kernels.engine.backends import BackendName
from srpo_kernels.verify import checks, timing
from srpo_kernels.verify.cases import cases
from srpo_kernels.verify.checks import Check
from srpo_kernels.verify.inputs import Case, Size
from srpo_kernels.verify.machine import Machine

# The interpreter takes some hundredths of a second per row and pass.
_INTERPRETED_SIZE = Size(4, 3, 67)
_SIZE = Size(6, 5, 1009)
_MANY_ROWS = Size(8, 64, 5003, 64)
# What the checks on the head of a current model need of an accelerator's memory.
_REALISTIC_BYTES = 8 << 30


@dataclass(frozen=True)
class Task:
    """A case in one dtype, held to the oracle on some backends, or ``repeated`` on one."""

    case: Case
    dtype: torch.dtype
    backends: Sequence[BackendName]
    device: torch.device
    repeated: bool = False

    @property
    def name(self) -> str:
        """As a progress bar shows it."""
        return f"{self.case.op}, {self.case.group}: {self.case.name}"

    def run(self) -> Iterable[Check]:
        """A check for each backend."""
        if self.repeated:
            return checks.determinism(self.case, self.dtype, self.backends[0], self.device)
        return checks.parity(self.case, self.dtype, self.backends, self.device)


def parity_tasks(machine: Machine, *, quick: bool = False, full: bool = False) -> list[Task]:
    """Every case; where ``quick`` one of each group and policy loss, where ``full`` the largest in every dtype."""
    if not machine.backends:
        return []
    realistic = machine.device.type != "cpu" and timing.free_bytes(machine.device) > _REALISTIC_BYTES
    size = _INTERPRETED_SIZE if _small(machine, full) else _SIZE
    chosen = cases(size, large=not quick, realistic=realistic and not quick)
    if quick:
        first = {(case.op, case.group, case.config.loss_type): case for case in reversed(chosen)}
        chosen = list(first.values())[::-1]
    # Truth takes seconds where the head is large.
    large = [x for x in machine.dtypes if x == torch.bfloat16 or (full and x != torch.float64)]
    tasks = []
    for case in chosen:
        for dtype in machine.dtypes:
            backends = [x for x in machine.backends if _runs(case, x) and dtype in machine.dtypes_of(x)]
            if backends and (not case.realistic or dtype in large):
                tasks.append(Task(case, dtype, backends, machine.device))
    return tasks


def determinism_tasks(machine: Machine, *, full: bool = False) -> list[Task]:
    """The sums that could depend on timing, on each backend in its first two dtypes."""
    repeated = checks.determinism_cases(_INTERPRETED_SIZE if _small(machine, full) else _MANY_ROWS)
    return [
        Task(case, dtype, [backend], machine.device, repeated=True)
        for case in repeated
        for backend in machine.backends
        for dtype in (machine.dtypes_of(backend)[:2] if _runs(case, backend) else ())
    ]


def _small(machine: Machine, full: bool) -> bool:
    return machine.interpreted and not full


def _runs(case: Case, backend: str) -> bool:
    """Whether a backend has the case's engine."""
    return case.engine != "tile" or backend == "triton"
