from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from srpo_kernels.verify.command_line import parse
from tools.gate.targets import TARGETS, TargetName


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compile every kernel configuration for every target, without a GPU, and hold the machine code to rules.

    Prints registers, occupancy, shared memory and tensor-core instructions, and for row passes the instructions
    per vocabulary element with a static roofline: time in the busiest pipe over time in the memory. Exits with 1
    where a rule is broken: spills, row passes with loads of less than 16 bytes or a ratio above 0.7, dots without
    the target's tensor cores, too much shared memory, more instructions per element than agreed. A target that this
    machine's Triton cannot compile for is named with the reason, the others are held to the rules, and it exits with 1.
    """

    targets: tuple[TargetName, ...] = tuple(TARGETS)
    """Architectures to compile for."""
    kernels: tuple[str, ...] = ()
    """Kernels to compile; all if not given."""
    jobs: int = 2
    """Processes."""
    csv: Path | None = None
    """File to write, a line per configuration and target."""
    docs: Path | None = None
    """Markdown file whose tables to replace, between `<!-- gate:resources -->` and `<!-- /gate:resources -->`, and the
    same for `gate:roofline`."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse(Options, "python -m tools.gate", arguments)
    # Imported here, so that --help need not wait for pandas.
    from tools.gate.command import gate

    gate(options)


if __name__ == "__main__":
    main()
