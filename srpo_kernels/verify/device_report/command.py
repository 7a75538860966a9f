"""Runs the sections that are missing, in a process that may die, until the time is over."""

from __future__ import annotations

import multiprocessing
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from srpo_kernels.verify.checks import describe
from srpo_kernels.verify.device_report.compiled import compiled_kernels
from srpo_kernels.verify.device_report.record import Record
from srpo_kernels.verify.device_report.render import failures, markdown
from srpo_kernels.verify.device_report.sections import Section, sections
from srpo_kernels.verify.device_report.sizes import SizesName
from srpo_kernels.verify.machine import Machine, inspect

# A section that is running when the time is over may end.
_GRACE_SECONDS = 180.0
# Exit codes of the process that runs the sections: the device is of no use to it any more; it has no device or folder.
_BROKEN, _REFUSED = 3, 4


@dataclass(frozen=True)
class Job:
    """What is reported where, and until when: seconds of ``time.time``. ``size`` None: what suits the device."""

    folder: Path
    device: str | None
    backend: str
    size: SizesName | None
    deadline: float


def write_report(job: Job, *, retry: bool = False) -> int:
    """Run what is missing, with ``retry`` what has failed too, and write both files; 0 where nothing has failed."""
    record = Record(job.folder)
    record.blame("its process ended")
    if retry:
        record.forget("failed")
    while True:
        begun = len(record.content["sections"])
        process = multiprocessing.get_context("spawn").Process(target=work, args=(job,))
        process.start()
        try:
            process.join(max(job.deadline - time.time(), 0.0) + _GRACE_SECONDS)
        except KeyboardInterrupt:
            process.kill()
            Record(job.folder).forget("running")
            raise
        hangs, code = process.is_alive(), process.exitcode
        process.kill()
        process.join()
        if code == _REFUSED:
            return _REFUSED
        record = Record(job.folder)
        record.blame("it was not done when the time was over" if hangs else f"its process ended with exit code {code}")
        if hangs or code == 0:
            break
        if len(record.content["sections"]) == begun:
            raise SystemExit(f"the process of the sections ended with exit code {code} before any of them")
    text = markdown(record.content)
    (job.folder / "report.md").write_text(text)
    found = failures(record.content)
    for line in found:
        print(line)
    print(f"{job.folder}: report.md and report.json; missing: {', '.join(record.content['missing']) or 'nothing'}")
    return 1 if found else 0


def work(job: Job) -> None:
    """Run sections in this process, which ends with an exit code of its own where it cannot go on."""
    # Lanes of the interpreter beyond the vocabulary overflow, as they may.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")
    record = Record(job.folder)
    try:
        machine = inspect(job.device, job.backend)
        size: SizesName = job.size or ("small" if machine.device.type == "cpu" else "gpu")
        identity = {"device": machine.device_name, "backends": list(machine.backends), "sizes": size}
        record.identify(identity | {"versions": machine.versions})
    except (RuntimeError, ValueError) as reason:
        # There is no such device, or the folder is another's.
        print(reason, file=sys.stderr)
        sys.exit(_REFUSED)
    every = sections(machine, size)
    for section in every:
        if record.state(section.name) is None and time.time() < job.deadline:
            _run(section, record, machine)
    record.missing([section.name for section in every if record.state(section.name) is None])


def _run(section: Section, record: Record, machine: Machine) -> None:
    record.begin(section.name)
    start = time.perf_counter()
    try:
        result = section.run()
    except Exception as reason:
        record.fail(section.name, describe(reason))
        if not _works(machine.device):
            sys.exit(_BROKEN)
    else:
        record.finish(section.name, result, time.perf_counter() - start)
    try:
        record.add_kernels(compiled_kernels(machine))
    except Exception as reason:
        record.fail("kernels", describe(reason))
    print(f"{section.name}: {record.state(section.name)}, {time.perf_counter() - start:.0f} s", flush=True)


def _works(device: torch.device) -> bool:
    """Whether this process can use the device: after a bad access it never can again."""
    try:
        torch.ones(2, device=device).sum().item()
    except Exception:
        return False
    return True
