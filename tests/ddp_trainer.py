"""One process of distributed training runs: `python -m tests.ddp_trainer FOLDER RUNS`, options by name as JSON.

Classes and rewards are those of `tests.tiny_trainer`, by their names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests import tiny_trainer

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    histories = {}
    for name, options in json.loads(sys.argv[2]).items():
        cls = getattr(tiny_trainer, options.pop("trainer", "ScriptedSRPO"))
        options["reward"] = getattr(tiny_trainer, options.pop("reward", "graded"))
        trainer = tiny_trainer.train(cls, folder / name, ddp_backend="gloo", **options)
        histories[name] = trainer.state.log_history
    if trainer.accelerator.is_main_process:
        (folder / "histories.json").write_text(json.dumps(histories))
    torch.distributed.destroy_process_group()
