"""Losses and averages of a model whose parameters FSDP1 has made flat, and of heads that FSDP shards by themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

pytest.importorskip("transformers", "5", reason="the integration needs transformers >= 5")
pytest.importorskip("peft", reason="adapters are PEFT's")

import peft

from srpo_kernels.integrations.transformers import AverageTeacher, check_model, response_loss, response_stats
from srpo_kernels.integrations.transformers.hidden import causal_model
from srpo_kernels.integrations.transformers.shards import UNITS
from tests.processes import needs_gloo, run_ranks
from tests.rank_training import (
    IDS,
    MASK,
    RESPONSES,
    ROUTED,
    assert_train_as,
    model_of,
    shard,
    train,
)

TRAINED = "what is trained"


def flat(model: Any, *, units: tuple[str, ...] = ("DecoderLayer",), **options: Any) -> nn.Module:
    """In FSDP1, whose ``units`` are the modules whose classes' names end so.

    With `TRAINED` among them, a layer that is trained is one, as PEFT has it.
    """

    def is_unit(module: nn.Module) -> bool:
        trained = TRAINED in units and "weight" in module._parameters and module.weight.requires_grad
        return type(module).__name__.endswith(units) or (trained and not any(module.children()))

    policy = partial(lambda_auto_wrap_policy, lambda_fn=is_unit)
    options = {"use_orig_params": True, "device_id": torch.device("cpu")} | options
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, **options)


def adapted(**options: Any) -> Any:
    """By default DoRA in the layers and on the head; B is not 0, so that it is in every gradient."""
    torch.manual_seed(2)
    adapters = options or {"target_modules": ["q_proj", "lm_head"], "use_dora": True}
    return peft.get_peft_model(model_of(tied=False), peft.LoraConfig(r=2, init_lora_weights=False, **adapters)).eval()


# PEFT's own DoRA reads adapters outside of their forwards.
lora = partial(adapted, target_modules=["q_proj", "lm_head"])
saved = partial(adapted, target_modules=["q_proj"], modules_to_save=["lm_head"])
tokens = partial(adapted, target_modules=["q_proj"], trainable_token_indices={"lm_head": [11, 30]})


def with_a_head_in_fsdp2(model: Any) -> nn.Module:
    fully_shard(model.lm_head)
    return shard(model)


def with_adapters_in_fsdp2(model: Any) -> nn.Module:
    """Units of FSDP2: each adapter of the head, what they are on, and the rest."""
    head = model.get_base_model().lm_head
    for adapter in (*head.lora_A.values(), *head.lora_B.values()):
        fully_shard(adapter)
    fully_shard(head)
    return fully_shard(model)


untied = partial(model_of, tied=False)
flattened = partial(flat, use_orig_params=False)
ALL_TRAINED = ("DecoderLayer", TRAINED)
OWN_HEAD = ("DecoderLayer", "Linear", "Gemma2Model")
WAYS: dict[str, tuple[Callable[[], Any], Callable[[Any], nn.Module]]] = {
    "original parameters": (model_of, flat),
    "flat parameters": (untied, flattened),
    "gathered after the forward": (model_of, partial(flattened, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP)),
    "not sharded": (model_of, partial(flat, sharding_strategy=ShardingStrategy.NO_SHARD)),
    "a head of its own": (untied, partial(flat, units=OWN_HEAD)),
    "a head of its own, flat": (untied, partial(flattened, units=OWN_HEAD)),
    "a head of its own in FSDP2": (untied, with_a_head_in_fsdp2),
    "adapters": (adapted, flat),
    "adapters in units of their own": (lora, partial(flat, units=ALL_TRAINED)),
    "adapters in units of their own, flat": (lora, partial(flattened, units=ALL_TRAINED)),
    "adapters in units in a unit": (lora, partial(flattened, units=(*ALL_TRAINED, "Linear"))),
    "adapters in units of FSDP2": (lora, with_adapters_in_fsdp2),
    "a saved head": (saved, partial(flattened, units=ALL_TRAINED)),
    "tokens": (tokens, flat),
}


# The ways in which the LM head has units of FSDP, and how many.
UNITS_OF_A_HEAD = {
    "a head of its own": 1,
    "a head of its own, flat": 1,
    "a head of its own in FSDP2": 1,
    "adapters in units of their own": 2,
    "adapters in units of their own, flat": 2,
    "adapters in units in a unit": 4,
    "adapters in units of FSDP2": 3,
    "a saved head": 1,
}


def whole_parameters(wrapped: nn.Module) -> dict[str, Tensor]:
    if not isinstance(wrapped, FullyShardedDataParallel):
        return {name: parameter.full_tensor() for name, parameter in wrapped.named_parameters()}
    with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
        return {
            name.replace("_fsdp_wrapped_module.", ""): parameter.detach().clone()
            for name, parameter in wrapped.named_parameters()
        }


def exchange(model: Any, wrapped: nn.Module) -> None:
    """Averages come and go whole, and between two forwards the model is what it was, whether it was gathered or not."""
    teacher = AverageTeacher(wrapped, 0.0)
    alone = AverageTeacher(model, 0.0)
    alone.load_state_dict({name: torch.rand_like(value) for name, value in alone.state_dict().items()})
    teacher.load_state_dict(alone.state_dict())
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in teacher.state_dict().items())
    before = response_stats(wrapped, IDS, MASK, response_mask=RESPONSES, backend="torch").log_probs
    with torch.no_grad():
        found, expected = (x.call_with_hidden(lambda hidden, _: hidden, input_ids=IDS) for x in (teacher, alone))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    after = response_stats(wrapped, IDS, MASK, response_mask=RESPONSES, backend="torch").log_probs
    assert torch.equal(after, before)


def call_others() -> list[list[Tensor]]:
    """Losses with another model for a teacher, in FSDP1 and not."""
    losses = []
    for wrap in (flat, flattened, partial(flat, units=OWN_HEAD)):
        teachers = untied(), wrap(untied())
        options = {"response_mask": RESPONSES, "advantages": torch.ones(4), "sdpo_mask": ROUTED, "backend": "torch"}
        losses.append([response_loss(model_of(), IDS, MASK, teacher=x, **options).loss.detach() for x in teachers])
    return losses


def train_a_rank(rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {"others": call_others()}
    for name, (make, wrap) in WAYS.items():
        model = make()
        wrapped = wrap(model)
        head = causal_model(wrapped).get_output_embeddings()
        assert sum(isinstance(unit, UNITS) for unit in head.modules()) == UNITS_OF_A_HEAD.get(name, 0), name
        check_model(wrapped, padding_free=True)
        results[name] = train(model, wrapped, slice(2 * rank, 2 * rank + 2), "torch")
        results[name]["parameters"] = whole_parameters(wrapped)
        exchange(make(), wrapped)
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(train_a_rank, 2, timeout_seconds=300)


@needs_gloo
@pytest.mark.parametrize("name", WAYS)
def test_two_ranks_train_as_one(name: str, ranks: Any) -> None:
    assert_train_as(WAYS[name][0](), [rank[name] for rank in ranks])


@needs_gloo
def test_another_model_in_flat_parameters_is_a_teacher(ranks: Any) -> None:
    for rank in ranks:
        for alone, sharded in rank["others"]:
            torch.testing.assert_close(sharded, alone)
