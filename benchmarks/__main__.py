from __future__ import annotations

from benchmarks import options
from tools import commands

if __name__ == "__main__":
    commands.run(
        "python -m benchmarks",
        "Measure srpo_kernels beside other ways to compute the same SRPO loss.",
        {
            "speed": (options.Speed, "benchmarks.speed", "forward and backward of every provider: time and memory"),
            "memory": (options.Memory, "benchmarks.memory", "peak memory alone, at sizes that are slow to time"),
            "accuracy": (
                options.Accuracy,
                "benchmarks.accuracy",
                "errors of every provider against the fp64 oracle",
            ),
            "scaling": (options.Scaling, "benchmarks.scaling", "how time and memory grow with rows and vocabulary"),
            "trainers": (options.Trainers, "benchmarks.trainers", "whole steps of TRL's trainer and of this library's"),
            "objectives": (options.Objectives, "benchmarks.objectives", "losses of one's own beside plain torch"),
            "cost": (options.Cost, "benchmarks.costs.command", "matmuls, launches and bytes, by count"),
            "report": (options.Report, "benchmarks.report", "tables and pictures of the results that are there"),
            "wire": (options.Wire, "benchmarks.wire", "what vocabulary parallelism sends, on paper"),
        },
    )
