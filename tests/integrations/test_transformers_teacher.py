"""Moving averages of a model's parameters: plain, in DDP and in FSDP2's shards, and the loss of sharded models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers", "5", reason="the integration needs transformers >= 5")

from srpo_kernels.integrations.transformers import (
    AverageTeacher,
    call_with_hidden,
    check_model,
    config_for,
    response_loss,
    response_stats,
    teacher_rows,
)
from tests.processes import needs_gloo, run_ranks
from tests.rank_training import ADVANTAGES, IDS, MASK, RESPONSES, model_of, shard, train
from tests.tiny_models import tiny_model_of


@torch.no_grad()
def move(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))


def test_the_average_goes_its_rate_towards_the_model() -> None:
    model = model_of()
    teacher, start = AverageTeacher(model, 0.25), copy.deepcopy(model.state_dict())
    move(model)
    teacher.update()
    teacher.update()
    for name, average in teacher.state_dict().items():
        expected = model.state_dict()[name].lerp(start[name], 0.75**2)
        torch.testing.assert_close(average, expected)
        assert not torch.equal(average, model.get_parameter(name))
    assert teacher.state_dict().keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_model_that_has_the_averages(tied: bool, dtype: torch.dtype) -> None:
    model = model_of(tied).to(dtype)
    teacher = AverageTeacher(model, 0.5)
    move(model)
    teacher.update()
    other = copy.deepcopy(model)
    other.load_state_dict({name: value.to(dtype) for name, value in teacher.state_dict().items()}, strict=False)
    options: dict[str, Any] = {"response_mask": RESPONSES, "config": config_for(model)}
    ours, theirs = (teacher_rows(who, IDS, MASK, **options) for who in (teacher, other))
    for name in ("hidden", "entropy", "target_ids"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0.0, atol=0.0)
    losses = [
        response_loss(model, IDS, MASK, sdpo_mask=torch.ones(4).bool(), teacher=who, **options).loss
        for who in (teacher, other)
    ]
    torch.testing.assert_close(*losses, rtol=0.0, atol=0.0)
    assert all(value.dtype == torch.float32 for value in teacher.state_dict().values())


def test_a_rate_of_0_is_a_frozen_teacher() -> None:
    model = model_of()
    teacher = AverageTeacher(model, 0.0)
    before = response_stats(model, IDS, MASK, response_mask=RESPONSES).log_probs
    move(model)
    teacher.update()
    with teacher.applied():
        torch.testing.assert_close(response_stats(model, IDS, MASK, response_mask=RESPONSES).log_probs, before)


def test_adapters_alone_have_an_average() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model_of(tied=False), peft.LoraConfig(target_modules=["q_proj", "lm_head"]))
    teacher = AverageTeacher(model, 0.5)
    assert all("lora_" in name for name in teacher.state_dict())
    # Head and hidden states are those of the adapters as they were: B is 0.
    with torch.no_grad(), model.disable_adapter():
        base = response_stats(model, IDS, MASK, response_mask=RESPONSES)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    out = response_loss(model, IDS, MASK, response_mask=RESPONSES, sdpo_mask=torch.ones(4).bool(), teacher=teacher)
    rows = teacher_rows(teacher, IDS, MASK, response_mask=RESPONSES)
    torch.testing.assert_close(rows.entropy, base.entropy[RESPONSES])
    assert out.metrics["divergence_sum"] > 0.1


def test_checkpoints(tmp_path: Path) -> None:
    model = model_of()
    teacher = AverageTeacher(model, 0.5)
    move(model)
    teacher.update()
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    resumed = AverageTeacher(model_of(), 0.5)
    resumed.load_state_dict(torch.load(tmp_path / "teacher.pt"))
    for name, average in resumed.state_dict().items():
        assert torch.equal(average, teacher.state_dict()[name])
    state = teacher.state_dict()
    name = next(iter(state))
    with pytest.raises(ValueError, match=r"state\['.*'\] must have shape \[96, 32\], got \[1\]"):
        resumed.load_state_dict(state | {name: torch.zeros(1)})
    del state[name]
    with pytest.raises(ValueError, match=rf"missing are \['{name}'\], unknown \[\]"):
        resumed.load_state_dict(state)


def test_bad_teachers() -> None:
    model = model_of()
    for rate, error in (
        (1.5, ValueError),
        (-0.1, ValueError),
        (float("nan"), ValueError),
        (True, TypeError),
        ("1", TypeError),
    ):
        with pytest.raises(error, match="rate must be"):
            AverageTeacher(model, rate)
    with pytest.raises(TypeError, match=r"model must be a transformers\.PreTrainedModel"):
        AverageTeacher(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model must have a parameter that is trained"):
        AverageTeacher(model_of().requires_grad_(False))


def test_an_error_within_leaves_the_model_as_it_was() -> None:
    model = model_of()
    teacher = AverageTeacher(model)
    before = dict(model.named_parameters())
    with pytest.raises(KeyError):
        teacher.call_with_hidden(lambda *_: {}["lost"], input_ids=IDS)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert "forward" not in vars(model)


WRAPPERS = {"DDP": DistributedDataParallel, "FSDP2": shard}


def train_a_rank(rank: int, name: str, tied: bool) -> dict[str, Any]:
    model = model_of(tied)
    wrapped = WRAPPERS[name](model)
    check_model(wrapped)
    # What an optimizer would be made of.
    assert all(isinstance(parameter, DTensor) for parameter in wrapped.parameters()) == (name == "FSDP2")
    result = train(model, wrapped, slice(2 * rank, 2 * rank + 2))
    if name == "FSDP2":
        # Between two forwards the model is what it was, whether it was gathered or not.
        teacher = AverageTeacher(wrapped, 0.0)
        before = response_stats(wrapped, IDS, MASK, response_mask=RESPONSES).log_probs
        saved = {key: torch.zeros_like(value) for key, value in teacher.state_dict().items()}
        teacher.load_state_dict(saved)
        hidden = teacher.call_with_hidden(lambda hidden, _: hidden, input_ids=IDS)
        assert not hidden.any()
        after = response_stats(wrapped, IDS, MASK, response_mask=RESPONSES).log_probs
        assert torch.equal(after, before)
        assert isinstance(wrapped, FSDPModule)
    return result


@needs_gloo
@pytest.mark.parametrize("name, tied", [("DDP", True), ("FSDP2", False), ("FSDP2", True)])
def test_two_ranks_train_as_one(name: str, tied: bool) -> None:
    model = model_of(tied)
    expected = train(model, model, slice(0, 4))
    ranks = run_ranks(train_a_rank, 2, name, tied, timeout_seconds=300)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(ranks[0]["losses"] + ranks[1]["losses"], expected["losses"], **close)
    torch.testing.assert_close(torch.cat([rank["log_probs"] for rank in ranks]), expected["log_probs"], **close)
    for result in ranks:
        for key in ("gradients", "averages", "parameters"):
            assert result[key].keys() == expected[key].keys(), key
            torch.testing.assert_close(result[key], expected[key], msg=lambda text, key=key: f"{key}: {text}", **close)


def another_sharded_teacher(rank: int) -> tuple[Tensor, Tensor]:
    model = model_of()
    torch.manual_seed(1)
    plain = tiny_model_of("gemma2", final_logit_softcapping=5.0, hidden_size=16)
    teacher = shard(copy.deepcopy(plain))
    results = []
    # The second rank has nothing to distill.
    routed = torch.ones(4).bool() if rank == 0 else torch.zeros(4).bool()
    for who in (plain, teacher):
        out = response_loss(
            model, IDS, MASK, response_mask=RESPONSES, advantages=ADVANTAGES, sdpo_mask=routed, teacher=who
        )
        results.append(out.loss.detach())
    return results[0], results[1]


@needs_gloo
def test_another_model_in_shards_is_a_teacher() -> None:
    for ours, theirs in run_ranks(another_sharded_teacher, 2, timeout_seconds=300):
        torch.testing.assert_close(theirs, ours)


def test_hooks_of_wrappers_run_around_the_function() -> None:
    model, events = model_of(), []
    model.register_forward_pre_hook(lambda *_: events.append("before"))
    model.register_forward_hook(lambda *_: events.append("after"))
    assert call_with_hidden(model, lambda *_: events.append("function"), input_ids=IDS) is None
    assert events == ["before", "function", "after"]
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        stats = [response_stats(x, IDS, MASK, response_mask=RESPONSES).log_probs for x in (compiled, model)]
    torch.testing.assert_close(*stats, rtol=0.0, atol=0.0)
