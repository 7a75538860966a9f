from __future__ import annotations

from tools import commands

if __name__ == "__main__":
    commands.run(
        "python -m benchmarks",
        "Measure srpo_kernels beside other ways to compute the same SRPO loss.",
        {
            "speed": ("benchmarks.speed", "forward and backward of every provider: time and memory"),
            "memory": ("benchmarks.memory", "peak memory alone, at sizes that are slow to time"),
            "accuracy": ("benchmarks.accuracy", "errors of every provider against the oracle in fp64"),
            "scaling": ("benchmarks.scaling", "how time and memory grow with rows and vocabulary"),
            "trainers": ("benchmarks.trainers", "whole steps of TRL's trainer and of this library's"),
            "objectives": ("benchmarks.objectives", "losses of one's own beside plain torch"),
            "cost": ("benchmarks.costs.command", "matmuls, launches and bytes, by count"),
            "report": ("benchmarks.report", "tables and pictures of the results that are there"),
            "wire": ("benchmarks.wire", "what vocabulary parallelism sends, on paper"),
        },
    )
