"""Measurements as long-format CSV: one row per case, provider and metric, with what it was measured on."""

from __future__ import annotations

import csv
import platform
import subprocess
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from benchmarks.cases import Case
from benchmarks.providers import ProviderName
from benchmarks.timing import Quantiles

_PACKAGES = ("torch", "trl")
_CPU_INFO = Path("/proc/cpuinfo")


class Errors(NamedTuple):
    """Relative differences from the provider that is compared with."""

    loss: float
    grad_hidden: float
    grad_weight: float


class Measurement(NamedTuple):
    """One provider on one case: seconds, their ratio to bare products in the same rounds, errors, bytes."""

    case: Case
    provider: ProviderName
    seconds: Quantiles
    ratio_to_bare: Quantiles | None
    errors: Errors | None
    peak_bytes: int | None
    peak_limit_bytes: float | None

    def metrics(self) -> Iterator[tuple[str, Quantiles]]:
        """Name and value of whatever was measured; single values fill all quantiles."""
        scalars = {"peak_bytes": self.peak_bytes, "peak_limit_bytes": self.peak_limit_bytes}
        if self.errors is not None:
            scalars |= {f"{name}_error": value for name, value in self.errors._asdict().items()}
        yield "seconds", self.seconds
        if self.ratio_to_bare is not None:
            yield "ratio_to_bare", self.ratio_to_bare
        for name, value in scalars.items():
            if value is not None:
                yield name, Quantiles(value, value, value)


def environment(threads: int) -> dict[str, str | int]:
    """What the numbers depend on beside the code that is measured."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": _device(),
        "threads": threads,
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
    }


def write_csv(path: Path, measurements: Sequence[Measurement], threads: int) -> None:
    """Write all measurements to ``path``, replacing what is there."""
    shared = environment(threads)
    rows = [
        {
            "head": m.case.head,
            **m.case.shape._asdict(),
            "workload": m.case.workload,
            "dtype": "float32",
            "provider": m.provider,
            "metric": name,
            **{quantile: f"{value:.6g}" for quantile, value in values._asdict().items()},
            **shared,
        }
        for m in measurements
        for name, values in m.metrics()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _device() -> str:
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
