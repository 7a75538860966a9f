"""Peak memory of a step, measured in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

import psutil

from benchmarks.results import Measured, Measurement, single
from srpo_kernels.verify.providers import Unsupported

T = TypeVar("T")

_STATUS = Path("/proc/self/status")
_OOM_SCORE = Path("/proc/self/oom_score_adj")
_FIRST_TO_BE_KILLED = "1000"
# glibc otherwise keeps what the step's preparation has freed, and the step would find it there.
_RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}


def fresh_peak(
    case: Measured, provider: str, measure: Callable[..., int | None], *arguments: object
) -> Iterator[Measurement[Measured]]:
    """The peak that ``measure`` finds in a process of its own, or why there is none; nothing where it finds None."""
    try:
        peak = in_fresh_process(measure, *arguments)
    except Unsupported as reason:
        yield Measurement(case, provider, "peak_bytes", None, str(reason))
        return
    if peak is not None:
        yield Measurement(case, provider, "peak_bytes", single(peak))


def in_fresh_process(function: Callable[..., T], *arguments: object) -> T:
    """What a call returns in a process of its own.

    Raises Unsupported where the call does, and where the process is killed, which the kernel does for want of memory.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    with patch.dict(os.environ, _RETURN_FREED_MEMORY):
        process.start()
    # Nobody else holds the sending end: a process that dies ends the wait.
    sender.close()
    try:
        answer: T | Unsupported = receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL:
            total = psutil.virtual_memory().total / 2**30
            raise Unsupported(f"killed: needs more than the machine's {total:.0f} GiB") from None
        raise RuntimeError(f"{function.__name__}{arguments} ended with exit code {process.exitcode}") from None
    process.join()
    if isinstance(answer, Unsupported):
        raise answer
    return answer


def extra_resident_bytes(step: Callable[[], object]) -> int | None:
    """The highest resident set of this process less that before the step; None where the system does not tell."""
    if not _STATUS.exists():
        return None
    before = _resident_bytes("VmRSS")
    step()
    return _resident_bytes("VmHWM") - before


def _answer(sender: Connection, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    if _OOM_SCORE.exists():
        # Not the process that waits for the answer.
        _OOM_SCORE.write_text(_FIRST_TO_BE_KILLED)
    try:
        answer = function(*arguments)
    except Unsupported as reason:
        answer = reason
    sender.send(answer)


def _resident_bytes(field: str) -> int:
    """A field of this process's status; the kernel gives KiB."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024
