"""``python -m tests.fuzz --backend torch --cases 3000 --seed 0``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from srpo_kernels.verify.command_line import parse


@dataclass(frozen=True, kw_only=True)
class Options:
    """Hold random calls of the public functions to the fp64 oracle: values, metrics and gradients.

    Every case is a function of one integer, its seed, which is printed with all of its options where something is off
    by more than rounding explains; --only repeats it. Exits with 1 where a case fails.
    """

    backend: Literal["torch", "triton"] = "torch"
    """triton: in Triton's interpreter, where there is no GPU."""
    cases: int = 3000
    seed: int = 0
    """Of the whole run: its cases have the seeds from a million times this on."""
    only: int | None = None
    """Seed of one case, to repeat it."""
    show: int = 20
    """How many of the failures are printed in full."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = parse(Options, "python -m tests.fuzz", arguments)
    # Imported here, so that --help need not wait for torch; before all others the interpreter, and what it needs.
    import tests.conftest  # noqa: F401
    from tests.fuzz.run import fuzz

    return fuzz(options)


if __name__ == "__main__":
    sys.exit(main())
