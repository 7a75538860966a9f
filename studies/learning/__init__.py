"""The learning study: GRPO, SDPO and SRPO on a small model that a CPU can train, over seeds."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
