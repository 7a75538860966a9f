"""``python -m tools.peers --verl CHECKOUT --prime-rl CHECKOUT``: the losses against those of TRL, verl and prime-rl."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from srpo_kernels.verify.command_line import parse

# Of the largest element, in fp32.
_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare losses and gradients with the peers' own functions on random batches in fp32.

    TRL has to be installed. Of verl and prime-rl a checkout, or an unpacked wheel, is enough: functions are taken out
    of its files, and neither is imported. Exits with 1 where one differs by more than 1e-6 of its largest element.
    """

    verl: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """A folder that has verl/trainer/ppo/core_algos.py, of 0.9 or newer."""
    prime_rl: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """A folder that has src/prime_rl/trainer/rl/loss.py."""
    batches: int = 200


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = parse(Options, "python -m tools.peers", arguments)
    # Imported here, so that --help need not wait for torch.
    import pandas as pd
    import torch
    from rich.console import Console

    from tools.documents import print_table, rich_table
    from tools.peers import prime_rl, trl, verl
    from tools.peers.batches import Comparison, compare

    torch.set_num_threads(1)
    comparisons: list[Comparison] = trl.comparisons()
    if options.verl is not None:
        comparisons += verl.comparisons(options.verl)
    if options.prime_rl is not None:
        comparisons += prime_rl.comparisons(options.prime_rl)
    lines, failures = [], 0
    for comparison in comparisons:
        differences = compare(comparison, options.batches)
        failed = max(differences.values()) > _TOLERANCE
        failures += failed
        lines.append(
            {"peer": comparison.peer, "theirs": comparison.theirs, "ours": comparison.ours}
            | {name: f"{value:.1e}" for name, value in differences.items()}
            | {"": "FAILED" if failed else ""}
        )
    caption = f"largest difference over {options.batches} batches, relative to the largest element"
    print_table(Console(highlight=False), rich_table(pd.DataFrame(lines).fillna("-"), "peers", caption))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
