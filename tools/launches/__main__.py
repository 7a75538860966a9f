"""``python -m tools.launches``: sweep, and write the table and the ten best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from srpo_kernels.verify.command_line import parse
from tools.gate.targets import TARGETS, TargetName

_ROOT = Path(__file__).parents[2]
RESULTS = _ROOT / "benchmarks" / "results" / "launches.csv"
DOCUMENT = _ROOT / "docs" / "gpu.md"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compile launches of the kernels that are not the engine's, without a GPU, and rank them on paper.

    By the machine code's instructions and registers and by data-sheet rates, for targets that have a data sheet.
    """

    targets: tuple[TargetName, ...] = tuple(name for name, target in TARGETS.items() if target.device is not None)
    """Architectures to compile for."""
    jobs: int = 2
    """Processes."""
    csv: Path = RESULTS
    """File for the ten best launches of each target, which `verify --tune` takes."""
    docs: Path = DOCUMENT
    """Markdown file whose table to replace."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse(Options, "python -m tools.launches", arguments)
    unknown = [name for name in options.targets if TARGETS[name].device is None]
    if unknown:
        known = ", ".join(name for name, target in TARGETS.items() if target.device is not None)
        raise SystemExit(f"no data sheet of {', '.join(unknown)}: there is one of {known}")
    # Imported here, so that --help need not wait for pandas.
    from tools.launches.sweep import best, sweep, write_table

    choices = sweep(options.targets, options.jobs)
    write_table(options.docs, choices)
    best(choices).to_csv(options.csv, index=False)


if __name__ == "__main__":
    main()
