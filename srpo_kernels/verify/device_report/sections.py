"""The sections of a report, in the order in which they are worth their time."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch

from srpo_kernels.verify.checks import Check, dtype_name
from srpo_kernels.verify.data_sheets import data_sheet
from srpo_kernels.verify.device_report.probes import products, row_passes
from srpo_kernels.verify.device_report.sizes import SizesName, sizes
from srpo_kernels.verify.device_report.steps import measure_step
from srpo_kernels.verify.machine import Machine
from srpo_kernels.verify.tasks import Task, determinism_tasks, parity_tasks

_PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "flash-attn")
# What they say of a GPU that torch does not.
_TOOLS = {
    "nvidia-smi": ("--query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv,noheader"),
    "rocm-smi": ("--showdriverversion", "--csv"),
}
_PROPERTIES = ("total_memory", "multi_processor_count", "L2_cache_size", "major", "minor", "gcnArchName")
# Whole steps that come before the rest of parity: of the head that is listed first.
_FIRST_STEPS = 3


class Section(NamedTuple):
    """A name, and what finds its result, of types that JSON has."""

    name: str
    run: Callable[[], Any]


def sections(machine: Machine, size: SizesName) -> list[Section]:
    """All of them. One case of each group comes before the other cases."""
    chosen = sizes(size, machine.dtypes)
    steps = [
        Section(f"step: {case.name}", partial(measure_step, case, machine.device, machine.device_name))
        for case in chosen.steps
    ]
    quick = parity_tasks(machine, quick=True)
    rest = [task for task in parity_tasks(machine) if (task.case, task.dtype) not in {(x.case, x.dtype) for x in quick}]
    return [
        Section("environment", partial(environment, machine)),
        Section("products", partial(products, machine, chosen)),
        *_checked("parity", quick, lambda task: dtype_name(task.dtype)),
        Section("determinism", partial(_check, determinism_tasks(machine))),
        Section("row passes", partial(row_passes, machine, chosen)),
        *steps[:_FIRST_STEPS],
        *(_checked("more parity", rest, _op_and_dtype) if size == "gpu" else ()),
        *steps[_FIRST_STEPS:],
    ]


def environment(machine: Machine) -> dict[str, Any]:
    """The device, the driver, the versions, and what torch is set to."""
    module = torch.get_device_module(machine.device)
    properties = module.get_device_properties(machine.device) if hasattr(module, "get_device_properties") else None
    sheet = data_sheet(machine.device_name)
    return {
        "device": {"type": machine.device.type, "name": machine.device_name},
        "properties": {name: getattr(properties, name) for name in _PROPERTIES if hasattr(properties, name)},
        "data_sheet": None if sheet is None else sheet._asdict(),
        "driver": _driver() if machine.device.type != "cpu" else None,
        "versions": machine.versions,
        "peers": {name: version for name in _PEERS if (version := _version(name)) is not None},
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "backends": list(machine.backends),
        "interpreted": machine.interpreted,
        "dtypes": [dtype_name(dtype) for dtype in machine.dtypes],
        "absent": machine.absent,
    }


def _driver() -> str | None:
    for tool, options in _TOOLS.items():
        if shutil.which(tool):
            done = subprocess.run([tool, *options], capture_output=True, text=True, check=False, timeout=60)
            if done.returncode == 0:
                return done.stdout.strip()
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _op_and_dtype(task: Task) -> str:
    return f"{task.case.op}, {dtype_name(task.dtype)}"


def _checked(name: str, tasks: Sequence[Task], key: Callable[[Task], str]) -> list[Section]:
    """A section for each value of ``key``, the first one's first."""
    keys = list(dict.fromkeys(map(key, tasks)))
    ordered = groupby(sorted(tasks, key=lambda task: keys.index(key(task))), key=key)
    return [Section(f"{name}: {part}", partial(_check, list(members))) for part, members in ordered]


def _check(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """For each backend, function and group the number of checks and the worst of them, and every one that failed."""
    groups: dict[tuple[str, ...], list[Check]] = {}
    for task in tasks:
        for check in task.run():
            groups.setdefault((check.kind, check.backend, check.dtype, check.op, check.group), []).append(check)
    return [_summary(members) for members in groups.values()]


def _summary(checks: Sequence[Check]) -> dict[str, Any]:
    first, failed = checks[0], [check for check in checks if not check.passed]
    names = ("kind", "backend", "dtype", "op", "group")
    return {name: getattr(first, name) for name in names} | {
        "checks": len(checks),
        # NaN is worse than any number, and has failed.
        "worst": None if failed else max(check.ratio for check in checks),
        "failed": [asdict(check) | {"ratio": check.ratio} for check in failed],
    }
