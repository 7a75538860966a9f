"""One process of distributed training runs: `python -m tests.ddp_trainer FOLDER RUNS`, options by name as JSON.

Classes and rewards are those of `tests.tiny_trainer`, by their names. A run with ``"shards"`` is one of FSDP with that
config, with ``"zero": 3`` one of DeepSpeed at that stage, with ``"loaded"`` one of a model that transformers loads in
shards of these sizes; ``"resume": 2`` goes on from the checkpoint of a run of two
steps.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp import _init_utils as fsdp_init
from torch.distributed.fsdp._flat_param import FlatParamHandle
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tests import tiny_trainer


def shard_on_cpu() -> None:
    """accelerate takes FSDP for processes with an accelerator alone: what it then sets is set for those without.

    FSDP1 is given the id of a device, of which a CPU has none, and moves what it saves to the CPU, where it is already.
    """
    fsdp_init._get_device_from_device_id = lambda *_: None
    FlatParamHandle.to_cpu = nullcontext
    prepare = AcceleratorState.__init__

    def prepared(self: Any, *args: Any, **kwargs: Any) -> None:
        prepare(self, *args, **kwargs)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = kwargs.get("fsdp_plugin") or self.fsdp_plugin

    AcceleratorState.__init__ = prepared


def in_shards(folder: Path, sizes: dict[str, int]) -> Any:
    """`tiny_trainer.divisible_model` in the shards of transformers, which accelerate takes for accelerators alone."""
    ParallelismConfig._validate_accelerator = lambda *_: None
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    # By the first process.
    tiny_trainer.divisible_model().save_pretrained(folder)
    torch.distributed.barrier()
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto", **sizes))


def without_shared_memory() -> None:
    """DeepSpeed compiles an all-reduce of its own for a CPU, for half a minute: gloo's does as well."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def run(folder: Path, name: str, options: dict[str, Any]) -> Any:
    """A trainer that has trained."""
    options = dict(options)
    cls = getattr(tiny_trainer, options.pop("trainer", "ScriptedSRPO"))
    options["reward"] = getattr(tiny_trainer, options.pop("reward", "graded"))
    sharding: dict[str, Any] = {}
    if (shards := options.pop("shards", None)) is not None:
        sharding = {"fsdp": True, "fsdp_config": shards}
    stage, whole = options.pop("zero", 0), options.pop("persistent", 0)
    if stage:
        without_shared_memory()
        sharding["deepspeed"] = zero(stage, whole)
    AcceleratorState._reset_state()
    os.environ["ACCELERATE_USE_FSDP"] = "true" if "fsdp" in sharding else "false"
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true" if stage else "false"
    options |= sharding | {"ddp_backend": "gloo"}
    if (step := options.pop("resume", None)) is not None:
        saved = options | {"save_strategy": "steps", "save_steps": step}
        tiny_trainer.train(cls, folder / name, **resolved(saved, folder) | {"max_steps": step})
        AcceleratorState._reset_state()
        trainer = tiny_trainer.tiny_trainer(cls, folder / name, **resolved(saved, folder))
        trainer.train(resume_from_checkpoint=str(folder / name / f"checkpoint-{step}"))
    else:
        trainer = tiny_trainer.train(cls, folder / name, **resolved(options, folder))
    version = shards["version"] if shards is not None else None
    assert isinstance(trainer.model, FullyShardedDataParallel) == (version == 1)
    in_parts = [isinstance(parameter, DTensor) for parameter in trainer.model.parameters()]
    loaded = options.get("loaded", {})
    # Tensor parallelism leaves norms whole.
    assert all(in_parts) == (version == 2 or "fsdp_size" in loaded)
    assert any(in_parts) == (version == 2 or bool(loaded))
    assert all(hasattr(parameter, "ds_tensor") == (stage == 3) for parameter in trainer.model.parameters())
    return trainer


def resolved(options: dict[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """``options`` with the models that they name; what is loaded in shards is whole without a ``folder``."""
    options = dict(options)
    model = tiny_trainer.tiny_model()
    if options.pop("tied", False):
        model = tiny_trainer.tiny_model(tie_word_embeddings=True)
    if (sizes := options.pop("loaded", None)) is not None:
        model = tiny_trainer.divisible_model() if folder is None else in_shards(folder / "whole", sizes)
    if (name := options.pop("other", None)) is not None:
        options |= {"teacher_model": getattr(tiny_trainer, name)(), "teacher_model_kind": "other"}
    if (adapters := options.pop("lora", None)) is not None:
        # Made before ZeRO-3 is known of: PEFT would read its tokens' first values on an accelerator alone.
        unset_hf_deepspeed_config()
        config = LoraConfig(r=2, target_modules=["q_proj"], **adapters)
        model = get_peft_model(model, config)
        for adapted, parameter in model.named_parameters():
            if "lora_A" in adapted:
                # The same on every rank, however the model was made.
                torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    return options | {"model": model}


def zero(stage: int, whole: int) -> dict[str, Any]:
    """DeepSpeed's options; parameters of up to ``whole`` elements stay whole between forwards."""
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "train_batch_size")
    return dict.fromkeys(auto, "auto") | {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": whole},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    shard_on_cpu()
    # Every trainer collects garbage: what is imported is none.
    gc.freeze()
    histories = {}
    for name, options in json.loads(sys.argv[2]).items():
        trainer = run(folder, name, options)
        histories[name] = trainer.state.log_history
    if trainer.accelerator.is_main_process:
        (folder / "histories.json").write_text(json.dumps(histories))
    torch.distributed.destroy_process_group()
