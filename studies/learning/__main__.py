from __future__ import annotations

import tyro

from studies.learning.drawing import draw
from studies.learning.pretrained import pretrained
from studies.learning.study import study
from studies.learning.sweep import sweep

if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(
        {"sweep": sweep, "study": study, "pretrained": pretrained, "draw": draw},
        prog="python -m studies.learning",
        description="What GRPO, SDPO and SRPO learn, on models that a CPU can train.",
    )
