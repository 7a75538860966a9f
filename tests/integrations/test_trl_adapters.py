"""PEFT and quantized models: what an adapter does to the LM head is in the log-probs, or it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("trl", "1.16", reason="the trl integration needs trl >= 1.16")
pytest.importorskip("peft", reason="adapters need peft")

import peft

from srpo_kernels.integrations.trl.head import LogitTransform, check_head
from tests.tiny_models import log_probs, patched
from tests.tiny_trainer import ScriptedSRPO, tiny_trainer


class Linear4bit(nn.Linear):
    """As bitsandbytes has it: packed weights, and a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.float().view(96, -1))


def test_a_quantized_head_is_refused() -> None:
    model = patched("llama")
    model.lm_head = Linear4bit(32, 96, bias=False)
    with pytest.raises(
        ValueError, match=r"got tests\.integrations\.test_trl_adapters\.Linear4bit: .*llm_int8_skip_modules"
    ):
        check_head(model, LogitTransform(1.0, None))
    model.lm_head = nn.Linear(32, 96, bias=False)
    model.lm_head.weight = nn.Parameter(torch.zeros(96 * 32 // 2, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"must have an LM head that is an nn\.Linear, and no more than that"):
        check_head(model, LogitTransform(1.0, None))


ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "lora": ({"target_modules": ["lm_head"]}, "peft.tuners.lora.layer.Linear"),
    "dora": ({"target_modules": ["lm_head"], "use_dora": True}, "peft.tuners.lora.layer.Linear"),
    "parameter": (
        {"target_modules": [], "target_parameters": ["lm_head.weight"]},
        "peft.tuners.lora.layer.ParamWrapper",
    ),
    "tokens": ({"trainable_token_indices": {"lm_head": [3]}}, "peft.utils.other.TrainableTokensWrapper"),
    "tied tokens": ({"trainable_token_indices": {"embed_tokens": [3]}}, "peft.utils.other.TrainableTokensWrapper"),
    "tied": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, "peft.tuners.lora.layer.Linear"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_on_the_head_is_refused_while_it_is_still_zero(name: str) -> None:
    options, kind = ADAPTERS[name]
    base = patched("llama", tie_word_embeddings="tied" in name)
    model = peft.get_peft_model(base, peft.LoraConfig(**{"target_modules": ["q_proj"]} | options))
    with pytest.raises(ValueError, match=rf"got {kind}: keep adapters .* modules_to_save=\['lm_head'\]"):
        check_head(model, LogitTransform(1.0, None))


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": False},
    "PromptTuningConfig": {"num_virtual_tokens": 3},
    "PrefixTuningConfig": {"num_virtual_tokens": 3},
}


@pytest.mark.parametrize("kind", PEFT_CONFIGS)
def test_peft_models_have_the_log_probs_of_rows_alone(kind: str) -> None:
    base = patched("llama", tie_word_embeddings=True)
    model = peft.get_peft_model(base, getattr(peft, kind)(task_type="CAUSAL_LM", **PEFT_CONFIGS[kind])).eval()
    transform = LogitTransform(1.0, None)
    check_head(model, transform)
    padded = torch.randint(10, 90, (2, 9))
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    with torch.no_grad():
        ours = log_probs(model, transform, input_ids=padded, attention_mask=mask)[:1, -5:]
        alone = padded[:1, 4:]
        expected = model(input_ids=alone, attention_mask=torch.ones_like(alone)).logits[:, -5:].log_softmax(-1)
    torch.testing.assert_close(ours, expected, rtol=0.0, atol=1e-5)


def test_a_head_that_is_saved_whole_is_the_one_that_is_in_use() -> None:
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(patched("llama"), peft.LoraConfig(**options)).eval()
    saved = model.get_base_model().lm_head.modules_to_save["default"].weight
    torch.nn.init.normal_(saved, std=0.3)
    transform, ids = LogitTransform(1.0, None), torch.randint(10, 90, (2, 6))
    check_head(model, transform)
    ours = log_probs(model, transform, input_ids=ids)
    torch.testing.assert_close(ours, model(input_ids=ids).logits.log_softmax(-1))
    ours.sum().backward()
    assert saved.grad.abs().sum() > 0
    with model.disable_adapter(), torch.no_grad():
        base = log_probs(model, transform, input_ids=ids)
        torch.testing.assert_close(base, model(input_ids=ids).logits.log_softmax(-1))
    assert not torch.allclose(base, ours)


def test_the_trainer_refuses_trainable_tokens_of_the_head(tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5]}, "task_type": "CAUSAL_LM"}
    with pytest.raises(ValueError, match="keep adapters and trainable tokens off it"):
        tiny_trainer(ScriptedSRPO, tmp_path, peft_config=peft.LoraConfig(**options))
