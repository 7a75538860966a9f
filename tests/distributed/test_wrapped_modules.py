"""``call_as_forward`` on compiled modules, and on wrappers in wrappers: every rank gets the mean of the gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm

from srpo_kernels import call_as_forward
from tests.processes import needs_gloo, run_ranks

pytest.importorskip("peft", reason="LoRA is one of the wrappers")
pytest.importorskip("accelerate", reason="accelerate compiles modules in its own way")

from accelerate.utils import compile_regions
from peft import LoraConfig, get_peft_model


class Model(nn.Module):
    """A model with a head; its forward is not what the loss needs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.lm_head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def with_lora(module: nn.Module) -> nn.Module:
    return get_peft_model(module, LoraConfig(r=2, target_modules=["layers.0"], init_lora_weights=False))


def with_normalized_head(module: nn.Module) -> nn.Module:
    weight_norm(module.lm_head)
    return module


def compiling_itself(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    return module


def with_a_compiled_forward(module: nn.Module) -> nn.Module:
    module.forward = torch.compile(module.forward, backend="eager")
    return module


Wrapper = Callable[[nn.Module], nn.Module]
compiled: Wrapper = partial(torch.compile, backend="eager")
regions_compiled: Wrapper = partial(compile_regions, backend="eager")
ddp = DistributedDataParallel


class Way(NamedTuple):
    """How a model is wrapped, from the inside, and what is done to it before."""

    wrappers: tuple[Wrapper, ...]
    adapt: Wrapper = lambda model: model


WAYS = {
    "DDP": Way((ddp,)),
    "compiled DDP": Way((ddp, compiled)),
    "DDP of a compiled module": Way((compiled, ddp)),
    "compiled DDP of a compiled module": Way((compiled, ddp, compiled)),
    "DDP that compiles itself": Way((ddp, compiling_itself)),
    "DDP of a module that compiles itself": Way((compiling_itself, ddp)),
    "DDP of a compiled forward": Way((with_a_compiled_forward, ddp)),
    "DDP with compiled regions": Way((ddp, regions_compiled)),
    "compiled DDP of LoRA": Way((ddp, compiled), with_lora),
    "compiled DDP of a parametrized head": Way((ddp, compiled), with_normalized_head),
    "compiled FSDP2": Way((fully_shard, compiled)),
    "FSDP2 that compiles itself": Way((fully_shard, compiling_itself)),
}


def states(rank: int) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(rank))


def loss_of(module: nn.Module, x: Tensor) -> Tensor:
    """A loss of the layers and of the head's parameters, without the module's forward."""
    for layer in module.layers:
        x = layer(x)
    return (x @ module.lm_head.weight.t() + module.lm_head.bias).square().sum()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Whole gradients, by the name that a parameter has without wrappers."""
    wrappers = ("module", "_orig_mod")
    found = {}
    for name, x in module.named_parameters():
        if x.grad is not None:
            short = ".".join(part for part in name.split(".") if part not in wrappers)
            found[short] = x.grad.full_tensor() if hasattr(x.grad, "full_tensor") else x.grad.clone()
    return found


def averaged_gradients(rank: int) -> dict[str, dict[str, Tensor]]:
    results = {}
    for name, way in WAYS.items():
        model = wrapped = way.adapt(Model())
        for wrap in way.wrappers:
            wrapped = wrap(wrapped)
        # Compiled once: what is kept of that must not run in the function's place.
        wrapped(states(rank)).sum().backward()
        wrapped.zero_grad()
        call_as_forward(wrapped, partial(loss_of, model), states(rank)).backward()
        results[name] = gradients(wrapped)
        assert wrapped(states(rank)).shape == (4, 2), name
    return results


@needs_gloo
def test_gradients_are_averaged_through_any_wrappers() -> None:
    ranks = run_ranks(averaged_gradients, 2, timeout_seconds=400)
    for name, way in WAYS.items():
        module = way.adapt(Model())
        sum(loss_of(module, states(rank)) / 2 for rank in range(2)).backward()
        for results in ranks:
            torch.testing.assert_close(results[name], gradients(module), msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", ["module", "_fsdp_wrapped_module", "_orig_mod"])
def test_the_names_that_wrappers_give_what_they_wrap(name: str) -> None:
    """Among them FSDP1's."""

    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> tuple[str, Tensor]:
            return "unsharded", getattr(self, name)(x)

    model, module = Model(), Wrapped()
    module.add_module(name, model)
    events: list[str] = []
    model.register_forward_pre_hook(lambda *_: events.append("hook"))
    result = call_as_forward(module, partial(loss_of, model), states(0))
    assert events == ["hook"]
    if name != "_orig_mod":
        assert result[0] == "unsharded"


# What no call can go through.


def refused_wrappers(rank: int) -> None:
    class Trainee(nn.Module):
        def __init__(self, policy: nn.Module) -> None:
            super().__init__()
            self.policy = policy

        def forward(self, x: Tensor) -> Tensor:
            return self.policy(x)

    held = Trainee(ddp(Model()))
    for module in (held, torch.compile(held, backend="eager"), nn.Sequential(ddp(Model()), nn.ReLU())):
        with pytest.raises(
            ValueError, match=r"module must not hold a DistributedDataParallel, got one at '(policy|0)'"
        ):
            call_as_forward(module, partial(loss_of, held.policy.module), states(rank))
    for module in (checkpoint_wrapper(Model()), ddp(checkpoint_wrapper(Model()))):
        with pytest.raises(ValueError, match="module must not be in a checkpoint wrapper"):
            call_as_forward(module, loss_of, module, states(rank))


@needs_gloo
def test_a_module_whose_hooks_would_not_run_is_refused() -> None:
    run_ranks(refused_wrappers, 1)


def test_copies_on_several_devices_are_refused() -> None:
    module = nn.DataParallel(Model())
    assert call_as_forward(module, partial(loss_of, module.module), states(0)).shape == ()
    module.device_ids = [0, 1]
    with pytest.raises(ValueError, match=r"module must not be in DataParallel on several devices, got \[0, 1\]"):
        call_as_forward(module, partial(loss_of, module.module), states(0))


def test_a_call_that_does_not_come_to_the_forward_is_an_error() -> None:
    class Elsewhere(Model):
        def __call__(self, *args: Any, **kwargs: Any) -> str:
            return "another way"

    module = Elsewhere()
    with pytest.raises(RuntimeError, match=r"module must call the forward of its Elsewhere.*function has not run"):
        call_as_forward(module, partial(loss_of, module), states(0))
    assert "forward" not in vars(module)


@pytest.mark.parametrize(
    "wrap",
    [compiled, compiling_itself, with_a_compiled_forward, torch.jit.script],
    ids=["compiled", "compiling_itself", "compiled_forward", "scripted"],
)
def test_what_a_module_was_called_through_comes_back(wrap: Wrapper) -> None:
    model = Model()
    module = wrap(model)
    before = dict(vars(module))
    assert torch.equal(call_as_forward(module, partial(loss_of, model), states(0)), loss_of(model, states(0)))
    assert vars(module) == before
    assert module(states(0)).shape == (4, 2)


def test_a_function_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match="function must be callable, got Tensor"):
        call_as_forward(Model(), states(0))  # type: ignore[arg-type]
