"""Losses and averages of models that ZeRO-3 has in parts, with adapters on the LM head."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", "5", reason="the integration needs transformers >= 5")
pytest.importorskip("peft", reason="adapters are PEFT's")
pytest.importorskip("deepspeed", reason="ZeRO is DeepSpeed's")

import peft

from srpo_kernels.integrations.transformers import AverageTeacher, check_model, response_loss
from tests.ddp_trainer import without_shared_memory, zero
from tests.processes import needs_gloo, run_ranks
from tests.rank_training import (
    ADVANTAGES,
    IDS,
    MASK,
    RESPONSES,
    assert_train_as,
    model_of,
    train,
)


def adapted(tied: bool = False, **options: Any) -> Any:
    """Adapters whose B is not 0, so that both are in every gradient."""
    torch.manual_seed(2)
    return peft.get_peft_model(model_of(tied), peft.LoraConfig(r=2, init_lora_weights=False, **options)).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "plain": partial(model_of, False),
    "tied": model_of,
    "LoRA": partial(adapted, target_modules=["q_proj", "lm_head"], lora_bias=True),
    "LoRA on the head alone": partial(adapted, target_modules=["lm_head"]),
    "DoRA": partial(adapted, target_modules=["lm_head"], use_dora=True),
    "a saved head": partial(adapted, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tokens": partial(adapted, target_modules=["q_proj"], trainable_token_indices={"lm_head": [11, 30]}),
    "tied tokens": partial(
        adapted, True, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [11, 30]}
    ),
}


def engine_of(model: Any, **options: Any) -> Any:
    import deepspeed

    config = zero(3, 0) | {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    config |= {"gradient_clipping": 0.0, "train_batch_size": 2}
    return deepspeed.initialize(model=model, config=config, **options)[0]


def whole_parameters(model: Any) -> dict[str, Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train_a_rank(rank: int) -> dict[str, Any]:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    without_shared_memory()
    results: dict[str, Any] = {}
    for name, make in MODELS.items():
        model = make()
        engine = engine_of(model, optimizer=torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0))

        def step_of(loss: Tensor, engine: Any = engine) -> None:
            engine.backward(loss)
            engine.step()

        check_model(engine, padding_free=True)
        results[name] = train(model, engine, slice(2 * rank, 2 * rank + 2), "torch", step_of)
        results[name]["parameters"] = whole_parameters(model)
        # As another model's teacher.
        options = {"response_mask": RESPONSES, "advantages": ADVANTAGES, "sdpo_mask": ADVANTAGES < 0.0}
        results[name]["taught"] = [
            response_loss(model_of(), IDS, MASK, teacher=teacher, backend="torch", **options).loss.detach()
            for teacher in (make(), engine_of(make()), AverageTeacher(engine_of(make()), 0.0))
        ]
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(train_a_rank, 2, timeout_seconds=400)


@needs_gloo
@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_train_as_one(name: str, ranks: Any) -> None:
    results = [rank[name] for rank in ranks]
    assert_train_as(MODELS[name](), results)
    for result in results:
        alone, *in_parts = result["taught"]
        for loss in in_parts:
            torch.testing.assert_close(loss, alone)
