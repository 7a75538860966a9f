"""One process of distributed training runs: `python -m tests.ddp_trainer FOLDER RUNS`, options by name as JSON.

Classes and rewards are those of `tests.tiny_trainer`, by their names. A run with ``"shards": true`` is one of FSDP2.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from tests import tiny_trainer


def shard_on_cpu() -> None:
    """accelerate takes FSDP for processes with an accelerator alone: what it then sets is set for those without."""
    prepare = AcceleratorState.__init__

    def prepared(self: Any, *args: Any, **kwargs: Any) -> None:
        prepare(self, *args, **kwargs)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = kwargs.get("fsdp_plugin") or FullyShardedDataParallelPlugin(fsdp_version=2)

    AcceleratorState.__init__ = prepared


def run(folder: Path, name: str, options: dict[str, Any]) -> Any:
    """A trainer that has trained."""
    options = dict(options)
    cls = getattr(tiny_trainer, options.pop("trainer", "ScriptedSRPO"))
    options["reward"] = getattr(tiny_trainer, options.pop("reward", "graded"))
    sharding: dict[str, Any] = {}
    if options.pop("shards", False):
        sharding = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
    AcceleratorState._reset_state()
    os.environ["ACCELERATE_USE_FSDP"] = "true" if sharding else "false"
    trainer = tiny_trainer.train(cls, folder / name, ddp_backend="gloo", **options, **sharding)
    assert all(isinstance(parameter, DTensor) == bool(sharding) for parameter in trainer.model.parameters())
    return trainer


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    shard_on_cpu()
    histories = {}
    for name, options in json.loads(sys.argv[2]).items():
        trainer = run(folder, name, options)
        histories[name] = trainer.state.log_history
    if trainer.accelerator.is_main_process:
        (folder / "histories.json").write_text(json.dumps(histories))
    torch.distributed.destroy_process_group()
