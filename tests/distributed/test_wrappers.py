"""Losses called as forwards, scales for averages, and parameters of which a rank has a part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from srpo_kernels import call_as_forward, scale_for_gradient_mean, srpo_loss, teacher_stats, token_stats
from tests.inputs import loss_inputs
from tests.processes import needs_gloo

INPUTS = loss_inputs(0, (4, 6), teacher_size=5)


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Called as a forward.


def hooked() -> tuple[nn.Linear, list[str]]:
    """A module whose hooks write down when they run."""
    module, events = nn.Linear(3, 2), []
    module.register_forward_pre_hook(lambda *_: events.append("before"))
    module.register_forward_hook(lambda *_: events.append("after"))
    return module, events


def test_the_function_runs_between_the_hooks_and_the_forward_comes_back() -> None:
    module, events = hooked()
    x = torch.randn(4, 3)

    def loss(x: Tensor, *, factor: float) -> Tensor:
        events.append("function")
        return factor * x.sum()

    assert torch.equal(call_as_forward(module, loss, x, factor=2.0), 2.0 * x.sum())
    assert events == ["before", "function", "after"]
    assert "forward" not in vars(module)
    assert module(x).shape == (4, 2)


def test_the_function_may_call_the_module_itself() -> None:
    module, events = hooked()
    x = torch.randn(4, 3)
    assert torch.equal(call_as_forward(module, lambda: module(x).sum()), module(x).sum())
    assert events == ["before", "before", "after", "after", "before", "after"]


def test_a_forward_of_the_instance_comes_back_after_an_error() -> None:
    """accelerate sets one."""
    module = nn.Linear(3, 2)
    own = module.forward = lambda x: x + 1.0

    def fail(*_: Any) -> None:
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        call_as_forward(module, fail)
    assert module.forward is own
    module.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="lost"):
        call_as_forward(module, lambda: None)
    assert module.forward is own


@needs_gloo
@pytest.mark.usefixtures("one_rank")
def test_the_call_goes_through_wrappers() -> None:
    module, events = hooked()
    wrapped = DistributedDataParallel(module)
    wrapped.register_forward_pre_hook(lambda *_: events.append("wrapper"))
    loss = call_as_forward(wrapped, lambda x: (x @ module.weight.t()).sum() + module.bias.sum(), torch.ones(4, 3))
    assert events == ["wrapper", "before", "after"]
    loss.backward()
    assert torch.equal(module.weight.grad, torch.full((2, 3), 4.0))


def test_a_module_that_owns_more_than_a_module_is_no_wrapper() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self) -> str:
            return "forward"

    model = Model()
    assert call_as_forward(model, lambda: "function") == "function"
    assert model() == "forward"


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"module must be an nn\.Module, got function"):
        call_as_forward(lambda: None, lambda: None)  # type: ignore[arg-type]


# Scales for averages.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scale_is_what_a_trainer_divides_by(dtype: torch.dtype) -> None:
    loss = torch.tensor(1.5, dtype=dtype, requires_grad=True)
    scaled = scale_for_gradient_mean(loss, world_size=8, accumulation_steps=3)
    scaled.backward()
    assert (scaled, scaled.dtype, loss.grad) == (36.0, dtype, 24.0)
    assert loss == 1.5


def test_without_a_process_group_there_is_one_rank() -> None:
    assert scale_for_gradient_mean(torch.tensor(1.5)) == 1.5


@pytest.mark.parametrize(
    ("loss", "options", "error", "message"),
    [
        (1.5, {}, TypeError, "loss must be a torch.Tensor, got float"),
        (torch.tensor(1), {}, TypeError, "loss must be float.*got int64"),
        (torch.tensor(1.5), {"world_size": 0}, ValueError, "world_size must be an int >= 1, got 0"),
        (torch.tensor(1.5), {"world_size": 2.0}, TypeError, "world_size must be an int >= 1, got 2.0"),
        (torch.tensor(1.5), {"accumulation_steps": True}, TypeError, "accumulation_steps must be an int.*got True"),
    ],
    ids=str,
)
def test_bad_scales(loss: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        scale_for_gradient_mean(loss, **options)


# Parts of tensors.


def sharded(x: Tensor) -> DTensor:
    return distribute_tensor(x, init_device_mesh("cpu", (1,)), [Shard(0)])


def partitioned(x: Tensor) -> Tensor:
    """What ZeRO-3 leaves of a parameter between its uses, and what it writes on it."""
    part = nn.Parameter(x.new_empty(0))
    part.ds_id, part.ds_shape = 0, x.shape
    return part


@needs_gloo
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias"])
def test_a_dtensor_is_refused_with_what_to_do(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be a whole tensor, got a DTensor.*Shard\(dim=0\).*call_as_for"):
        srpo_loss(**INPUTS | {name: sharded(INPUTS[name])})


@pytest.mark.parametrize("name", ["weight", "bias", "teacher_weight", "teacher_bias"])
def test_a_partitioned_parameter_is_refused_with_what_to_do(name: str) -> None:
    shape = list(INPUTS[name].shape)
    message = rf"{name} must be a whole tensor.*ZeRO-3.*\[0\] of \[{shape[0]}.*call_as_forward"
    with pytest.raises(ValueError, match=message):
        srpo_loss(**INPUTS | {name: partitioned(INPUTS[name])})


@needs_gloo
@pytest.mark.usefixtures("one_rank")
def test_statistics_refuse_parts_too() -> None:
    hidden, ids = INPUTS["hidden"], INPUTS["target_ids"]
    for weight in (sharded(INPUTS["weight"]), partitioned(INPUTS["weight"])):
        with pytest.raises(ValueError, match="weight must be a whole tensor"):
            token_stats(hidden, weight, ids)
        with pytest.raises(ValueError, match="teacher_weight must be a whole tensor"):
            teacher_stats(hidden, weight)


def test_a_parameter_that_zero_3_has_gathered_is_taken() -> None:
    weight = nn.Parameter(INPUTS["weight"].clone())
    weight.ds_id, weight.ds_shape = 0, weight.shape
    assert srpo_loss(**INPUTS | {"weight": weight}).loss == srpo_loss(**INPUTS).loss
