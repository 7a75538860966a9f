from __future__ import annotations

from tools import commands

if __name__ == "__main__":
    commands.run(
        "python -m studies.learning",
        "What GRPO, SDPO and SRPO learn, on models that a CPU can train.",
        {
            "sweep": ("studies.learning.sweep", "the cells that compare methods, each at its own learning rate"),
            "study": ("studies.learning.study", "every method and seed on a small model"),
            "choices": ("studies.learning.choices", "what a teacher holds of a right reply that it was not shown"),
            "pretrained": ("studies.learning.pretrained", "the same on a pretrained model"),
            "draw": ("studies.learning.drawing", "curves of the results that are there"),
        },
    )
