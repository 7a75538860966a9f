"""A model on several devices, as a ``device_map`` has it: loss, gradients and statistics are those on one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", "5", reason="the integration needs transformers >= 5")
pytest.importorskip("accelerate.hooks", reason="device maps are accelerate's")

from srpo_kernels.integrations.transformers import (
    AverageTeacher,
    check_model,
    response_loss,
    response_normalizers,
    response_stats,
    teacher_rows,
)
from srpo_kernels.integrations.transformers.head import resolve_config
from tests.far_device import FAR, NEAR, FarTensor, here_and_there, split
from tests.tiny_models import tiny_model_of

MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8, [1, 1, 1, 1, 1, 1, 0, 0]])
RESPONSES = (MASK.cumsum(1) > 3) & (MASK == 1)
IDS = torch.randint(10, 90, (3, 8), generator=torch.Generator().manual_seed(1))
ROUTED, ADVANTAGES = torch.tensor([True, False, True]), torch.tensor([0.3, -1.0, 0.7])
# By name: where the embeddings are, and with them the batch; the second half of the layers; the head.
MAPS = {"the last layers far": (NEAR, FAR, NEAR), "all but the head far": (FAR, FAR, NEAR)}


@pytest.fixture(autouse=True)
def far() -> Iterator[None]:
    with here_and_there():
        yield


def batch(device: torch.device) -> dict[str, Tensor]:
    tensors = {"input_ids": IDS, "attention_mask": MASK, "response_mask": RESPONSES}
    return {name: x.to(device) for name, x in tensors.items()}


def results(model: Any, device: torch.device, teacher: str, **options: Any) -> dict[str, Tensor]:
    """Loss, metrics, statistics and gradients of a batch on ``device``."""
    tokens = batch(device)
    config = resolve_config(model, None)
    source: Any = {"average": AverageTeacher, "live": lambda model: model}[teacher](model)
    routed, advantages = ROUTED.to(device), ADVANTAGES.to(device)
    taught = teacher_rows(source, **{name: x[routed] for name, x in tokens.items()}, config=config, **options)
    # The library's own functions know no tensors but torch's.
    norms = response_normalizers(RESPONSES, ROUTED, taught._replace(entropy=taught.entropy.cpu()), config=config)
    stats = response_stats(model, **tokens, **options)
    shared = {"advantages": advantages, "sdpo_mask": routed, "old_log_probs": stats.log_probs.detach() + 0.1}
    out = response_loss(model, **tokens, **shared, teacher=taught, normalizers=norms, **options)
    (out.loss + stats.entropy.sum()).backward()
    found = {"loss": out.loss, "log_probs": out.log_probs, "entropy": stats.entropy, "taught": taught.entropy}
    found |= {f"metric {name}": x for name, x in out.metrics.items()}
    assert all(x.device == device for x in found.values())
    return found | {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("teacher", "padding_free"), [("average", False), ("live", True)])
@pytest.mark.parametrize("places", MAPS.values(), ids=MAPS)
def test_a_model_in_parts_is_the_model(
    places: tuple[torch.device, torch.device, torch.device], teacher: str, padding_free: bool
) -> None:
    whole = tiny_model_of("llama").double()
    parts = split(copy.deepcopy(whole), *places)
    check_model(parts, padding_free=padding_free)
    expected = results(whole, NEAR, teacher, padding_free=padding_free)
    found = results(parts, places[0], teacher, padding_free=padding_free)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name].cpu(), value, rtol=1e-9, atol=1e-12), name
    assert parts.lm_head.weight.grad.device == places[2]
    assert parts.model.norm.weight.grad.device == places[1]


def test_the_second_device_refuses_tensors_of_the_first() -> None:
    there = torch.ones(2).to(FAR)
    assert isinstance(there, FarTensor) and there.device == FAR
    assert torch.equal((there * 2).cpu(), torch.full((2,), 2.0))
    with pytest.raises(RuntimeError, match="two devices"):
        there + torch.ones(2)
