"""What the ranks of a gloo group do with the teacher of an `SRPOEngine`, over steps and checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import tests.integrations.verl.cpu_platform  # noqa: F401
from srpo_kernels.integrations.transformers.shards import release
from srpo_kernels.integrations.verl.engine import SRPOEngine
from tests.integrations.verl import tiny
from tests.integrations.verl.engine_ranks import Case, build, mini_batch


def states(case: Case, models: Path, checkpoint: Path) -> dict[str, Any]:
    """Three steps, one that is skipped, a checkpoint; see test_engine_state.py."""
    folder = str(checkpoint)
    data = mini_batch(case, tiny.rollouts())
    engine = build(case, models, optimizer="AdamW", lr=1e-2)
    assert engine.average is not None
    # The average of shards is the shard of the average: both are compared as shards.
    plain = {name: average.clone() for name, average in engine.average.averages.items()}
    for _ in range(3):
        _train(engine, data)
        for name, shard in _shards(engine).items():
            plain[name] += case.rate * (shard.to(plain[name]) - plain[name])
    found: dict[str, Any] = {"plain": plain, "student": _shards(engine)}
    found["averages"] = {name: average.clone() for name, average in engine.average.averages.items()}
    found["before_teacher"] = _shards(engine)
    with engine.train_mode(), engine.average.applied():
        pass
    found["after_teacher"] = _shards(engine)

    broken = data.copy()
    broken["advantages"] = tiny.nested([x * torch.inf for x in data["advantages"].unbind()])
    found["norm"] = _train(engine, broken)["metrics"]["grad_norm"]
    found["unmoved"] = _equal(engine.average.averages, found["averages"])

    engine.save_checkpoint(folder, global_step=3)
    other = build(case, models, optimizer="AdamW", lr=1e-2)
    assert other.average is not None
    other.load_checkpoint(folder, del_local_after_load=False)
    found["restored"] = _equal(other.average.averages, found["averages"])
    found["next_losses"] = [sum(_train(x, data)["loss"]) for x in (engine, other)]

    without = build(replace(case, teacher="live"), models, optimizer="AdamW", lr=1e-2)
    without.save_checkpoint(f"{folder}_live", global_step=3)
    try:
        other.load_checkpoint(f"{folder}_live", del_local_after_load=False)
        found["refusal"] = ""
    except ValueError as error:
        found["refusal"] = str(error)
    return found


def _train(engine: SRPOEngine, data: Any) -> dict[str, Any]:
    with engine.train_mode():
        out: dict[str, Any] = engine.train_batch(data.copy(), loss_function=None)
    return out


@torch.no_grad()
def _shards(engine: SRPOEngine) -> dict[str, Tensor]:
    release(engine.module)
    return {
        name: (p.to_local() if isinstance(p, DTensor) else p).clone()
        for name, p in engine.module.named_parameters()
        if p.requires_grad
    }


def _equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
