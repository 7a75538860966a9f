from __future__ import annotations

import tyro

from benchmarks.accuracy import accuracy
from benchmarks.costs.command import cost
from benchmarks.memory import memory
from benchmarks.objectives import objectives
from benchmarks.report import report
from benchmarks.scaling import scaling
from benchmarks.speed import speed
from benchmarks.trainers import trainers
from benchmarks.wire import wire

if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(
        {
            "speed": speed,
            "memory": memory,
            "accuracy": accuracy,
            "scaling": scaling,
            "trainers": trainers,
            "objectives": objectives,
            "cost": cost,
            "report": report,
            "wire": wire,
        },
        prog="python -m benchmarks",
        description="Measure srpo_kernels beside other ways to compute the same SRPO loss.",
    )
