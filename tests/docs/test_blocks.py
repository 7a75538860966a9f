"""Every block of code in README and docs is run by a test; those that need a few tensors alone, by this one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import srpo_kernels as sk

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = {
    str(path.relative_to(ROOT)): BLOCK.findall(path.read_text())
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
# How many blocks the tests of a document run, which are beside this one or, where they need TRL, in integrations.
ELSEWHERE = {
    "README.md": 5,
    "docs/distributed.md": 6,
    "docs/own_loop.md": 5,
    "docs/recipes.md": 6,
    "docs/trainers.md": 2,
}
HERE = ("docs/losses.md", "docs/vocabulary_parallel.md")


def test_every_block_is_run_by_a_test() -> None:
    assert {name: len(found) for name, found in BLOCKS.items() if found and name not in HERE} == ELSEWHERE
    assert all(BLOCKS[name] for name in HERE)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """The only rank of a group."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("block", [block for name in HERE for block in BLOCKS[name]])
def test_a_block_runs_as_it_stands(block: str, group: dist.ProcessGroup) -> None:
    weight = torch.randn(13, 6, requires_grad=True)
    target_ids = torch.randint(13, (4, 5))
    log_probs, ids = torch.randn(4, 5, 13).log_softmax(-1).topk(3)
    others = torch.stack([target_ids, (target_ids + 1) % 13, (target_ids + 5) % 13], -1)
    given: dict[str, Any] = {
        "sk": sk,
        "hidden": torch.randn(4, 5, 6, requires_grad=True),
        "weight": weight,
        "lm_head_shard": weight,
        "group": group,
        "target_ids": target_ids,
        "advantages": torch.randn(4),
        "old_log_probs": -2.5 + 0.1 * torch.randn(4, 5),
        "rollout_log_probs": -2.5 + 0.1 * torch.randn(4, 5),
        "ids": ids,
        "log_probs": log_probs,
        "support_ids": others,
        "config": sk.SRPOConfig(distillation_mode="topk", topk=3, topk_of="teacher"),
    }
    exec(block, given)
    out = given.get("out")
    if out is not None:
        loss = out.loss
        loss.backward()
        assert loss.isfinite() and weight.grad is not None and weight.grad.any()
    else:
        assert isinstance(given["config"], sk.SRPOConfig)
