"""One process of a distributed training run: `python -m tests.ddp_trainer FOLDER OPTIONS`, options as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.tiny_trainer import ScriptedSRPO, tiny_trainer

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    trainer = tiny_trainer(ScriptedSRPO, folder, ddp_backend="gloo", **json.loads(sys.argv[2]))
    trainer.train()
    if trainer.accelerator.is_main_process:
        (folder / "history.json").write_text(json.dumps(trainer.state.log_history))
    torch.distributed.destroy_process_group()
