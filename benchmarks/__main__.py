from __future__ import annotations

import tyro

from benchmarks.memory import peak
from benchmarks.speed import speed

if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(
        {"speed": speed, "peak": peak},
        prog="python -m benchmarks",
        description="Measure srpo_kernels beside other ways to compute the same SRPO loss.",
    )
