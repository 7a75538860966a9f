"""Measurements as long-format tables: one row per case, provider and metric, with what it was measured on."""

from __future__ import annotations

import math
import platform
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

import pandas as pd
import torch

from srpo_kernels.verify.rounds import Quantiles

_PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "flash-attn", "quack-kernels")
_CPU_INFO = Path("/proc/cpuinfo")
# Of a number in a file.
_DIGITS = ".6g"


class Labelled(Protocol):
    """Something that is measured."""

    @property
    def labels(self) -> dict[str, object]:
        """What names it in a file."""


Measured = TypeVar("Measured", bound=Labelled)


class Measurement(NamedTuple, Generic[Measured]):
    """One number of a provider on a case, or the ``reason`` why there is none."""

    case: Measured
    provider: str
    metric: str
    values: Quantiles | None
    reason: str = ""


def single(value: float) -> Quantiles:
    """A number that was measured once."""
    return Quantiles(value, value, value)


def resolve_device(device: str) -> torch.device:
    """``"auto"`` is a GPU where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def resolve_threads(threads: int | None) -> int:
    """Tell torch, where a number is given; how many it has."""
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


class ResultsFile:
    """A CSV file that grows with every case, so that a long run loses nothing and can be resumed."""

    def __init__(self, path: Path, device: torch.device, threads: int, *, resume: bool = False) -> None:
        self._path, self._environment = path, environment(device, threads)
        self._cells = read_csv(path) if resume and path.exists() else pd.DataFrame()

    def missing(self, cases: Sequence[Measured]) -> list[Measured]:
        """The cases that the file has no row of."""
        if self._cells.empty:
            return list(cases)
        known = {_key(row) for row in self._cells[list(cases[0].labels)].itertuples(index=False)}
        return [case for case in cases if _key(case.labels.values()) not in known]

    def add(self, measurements: Iterable[Measurement[Measured]]) -> None:
        """Append the measurements of a case and write the file."""
        rows = [
            {
                **m.case.labels,
                "provider": m.provider,
                "metric": m.metric,
                **(Quantiles(math.nan, math.nan, math.nan) if m.values is None else m.values)._asdict(),
                "reason": m.reason,
                **self._environment,
            }
            for m in measurements
        ]
        self._cells = pd.concat([self._cells, pd.DataFrame(rows)], ignore_index=True)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._cells.to_csv(self._path, index=False, float_format=f"%{_DIGITS}")


def _key(labels: Iterable[object]) -> tuple[str, ...]:
    """The same for labels of a case and for those that are read back, as integers, floats or text."""
    return tuple(map(_plain, labels))


def _plain(label: object) -> str:
    text = str(label)
    try:
        return format(float(text), _DIGITS)
    except ValueError:
        return text


def read_csv(path: Path) -> pd.DataFrame:
    """What a ``ResultsFile`` wrote."""
    if not path.exists():
        raise SystemExit(f"{path} is not there: run `python -m benchmarks {path.stem}` first")
    return pd.read_csv(path, keep_default_na=False, na_values={"p20": [""], "median": [""], "p80": [""]})


def describe_machine(cells: pd.DataFrame) -> str:
    """In words, where the rows of a CSV were measured."""
    first = cells.iloc[0]
    threads = "1 thread" if first["threads"] == 1 else f"{first['threads']} threads"
    return f"{threads} of an {first['device']}" if first["accelerator"] == "cpu" else str(first["device"])


def describe_environment(cells: pd.DataFrame) -> str:
    """In words, what the rows of a CSV were measured on."""
    first = cells.iloc[0]
    packages = [f"{name} {first[name]}" for name in ("python", *_PACKAGES) if first[name] not in ("", "-")]
    days = sorted({str(date)[:10] for date in cells["date"]})
    commits = list(dict.fromkeys(map(str, cells["commit"])))
    when = f"{' to '.join(dict.fromkeys((days[0], days[-1])))}, commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    return f"{describe_machine(cells)}; {', '.join(packages)}; {when}"


def environment(device: torch.device, threads: int) -> dict[str, str | int]:
    """What the numbers depend on beside the code that is measured."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "accelerator": device.type,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": threads,
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
    }


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"
