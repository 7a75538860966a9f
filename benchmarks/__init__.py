"""``srpo_kernels`` measured beside other ways to compute the same loss: ``python -m benchmarks --help``."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
