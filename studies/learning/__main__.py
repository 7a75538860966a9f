from __future__ import annotations

from studies.learning import options
from tools import commands

if __name__ == "__main__":
    commands.run(
        "python -m studies.learning",
        "What GRPO, SDPO and SRPO learn, on models that a CPU can train.",
        {
            "sweep": (
                options.Sweep,
                "studies.learning.sweep",
                "the cells that compare methods, each at its own learning rate",
            ),
            "study": (options.Study, "studies.learning.study", "every method and seed on a small model"),
            "choices": (
                options.Choices,
                "studies.learning.choices",
                "what a teacher holds of a right reply that it was not shown",
            ),
            "pretrained": (options.Pretrained, "studies.learning.pretrained", "the same on a pretrained model"),
            "draw": (options.Draw, "studies.learning.drawing", "curves of the results that are there"),
        },
    )
