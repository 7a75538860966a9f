"""One process of distributed training runs: `python -m tests.ddp_trainer FOLDER RUNS`, options by name as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.tiny_trainer import ScriptedSRPO, tiny_trainer

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    histories = {}
    for name, options in json.loads(sys.argv[2]).items():
        trainer = tiny_trainer(ScriptedSRPO, folder / name, ddp_backend="gloo", **options)
        trainer.train()
        histories[name] = trainer.state.log_history
    if trainer.accelerator.is_main_process:
        (folder / "histories.json").write_text(json.dumps(histories))
    torch.distributed.destroy_process_group()
