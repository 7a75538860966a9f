"""PEFT and quantized models: what an adapter does to the LM head is in the log-probs, or it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", "5", reason="the integration needs transformers >= 5")
pytest.importorskip("peft", reason="adapters need peft")

import peft

from srpo_kernels.integrations.transformers import check_model, head_operands, response_loss, response_stats
from tests.tiny_models import log_probs, tiny_model_of


class Linear4bit(nn.Linear):
    """As bitsandbytes has it: packed weights, and a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.float().view(96, -1))


def test_a_quantized_head_is_refused() -> None:
    model = tiny_model_of("llama")
    model.lm_head = Linear4bit(32, 96, bias=False)
    with pytest.raises(
        ValueError, match=r"got tests\..*test_transformers_adapters\.Linear4bit: .*llm_int8_skip_modules"
    ):
        check_model(model)
    model.lm_head = nn.Linear(32, 96, bias=False)
    model.lm_head.weight = nn.Parameter(torch.zeros(96 * 32 // 2, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"must have an LM head that is an nn\.Linear, and no more than that"):
        check_model(model)


def test_an_offloaded_head_is_refused() -> None:
    model = tiny_model_of("llama")
    model.lm_head = nn.Linear(32, 96, bias=False, device="meta")
    with pytest.raises(ValueError, match="its weight is offloaded"):
        check_model(model)


# What is in the head's own product, by the options of LoraConfig.
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "lm_head"]},
    "rslora": {"target_modules": ["lm_head"], "use_rslora": True, "lora_alpha": 3},
    "lora with a bias": {"target_modules": ["lm_head"], "lora_bias": True},
    "dora": {"target_modules": ["lm_head"], "use_dora": True},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 30]}},
    "tied tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 30]}},
    "tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "tied and saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}
OTHERS: dict[str, peft.PeftConfig] = {
    "IA3": peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
    "LoHa": peft.LoHaConfig(target_modules=["lm_head"]),
    "a parameter": peft.LoraConfig(target_modules=[], target_parameters=["lm_head.weight"]),
}


def adapted(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model with an adapter that is no longer new, and a head with a bias where it is not tied."""
    base = tiny_model_of("llama", tie_word_embeddings="tied" in name)
    if "tied" not in name:
        base.lm_head.bias = nn.Parameter(torch.randn(96))
    model = peft.get_peft_model(base.to(dtype), peft.LoraConfig(**{"r": 4} | ADAPTERS[name] | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def gradients(model: Any) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_on_the_head_is_in_log_probs_and_gradients(name: str) -> None:
    model, ids = adapted(name), torch.randint(10, 90, (2, 6))
    check_model(model)
    mask = torch.arange(6).expand(2, 6) > 1
    ours = response_stats(model, ids, response_mask=mask).log_probs
    logits = model(input_ids=ids).logits[:, :-1]
    expected = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(ours[:, 2:], expected[:, 1:], rtol=0.0, atol=1e-5)
    expected[:, 1:].sum().backward()
    theirs = gradients(model)
    assert any(gradient is not None and gradient.any() for gradient in theirs)
    model.zero_grad()
    ours.sum().backward()
    torch.testing.assert_close(gradients(model), theirs, rtol=1e-4, atol=1e-5)
    model.zero_grad()
    # Advantages of 1 and no old log-probs: the gradient is that of the mean of minus the log-probs.
    response_loss(model, ids, response_mask=mask, advantages=torch.ones(2)).loss.backward()
    expected_gradients = [None if gradient is None else -gradient / int(mask.sum()) for gradient in theirs]
    torch.testing.assert_close(gradients(model), expected_gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_that_are_switched_off_or_merged(name: str) -> None:
    model, ids = adapted(name), torch.randint(10, 90, (1, 6))
    with torch.no_grad():
        before = log_probs(model, input_ids=ids)
        with model.disable_adapter():
            check_model(model)
            off = log_probs(model, input_ids=ids)
            torch.testing.assert_close(off, model(input_ids=ids).logits.log_softmax(-1))
        assert not torch.allclose(off, before)
        if "saved" not in name and "save" not in name and name != "lora with a bias":
            model.merge_adapter()
            torch.testing.assert_close(log_probs(model, input_ids=ids), model(input_ids=ids).logits.log_softmax(-1))


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_of_a_model_in_bf16(name: str) -> None:
    model = adapted(name, torch.bfloat16)
    check_model(model)
    operands = head_operands(torch.randn(2, 32).bfloat16(), model.get_base_model().get_output_embeddings())
    assert operands.hidden.dtype == operands.weight.dtype == torch.bfloat16


def test_a_small_update_of_a_head_in_bf16_is_not_rounded_away() -> None:
    """LoRA's own weights are in fp32; merged into the head's, an update of a thousandth would be lost."""
    model = adapted("lora", torch.bfloat16)
    head, hidden = model.get_base_model().lm_head, torch.randn(64, 32).bfloat16()
    down, up = head.lora_A["default"].weight, head.lora_B["default"].weight
    with torch.no_grad():
        up.mul_(1e-3)
        operands = head_operands(hidden, head)
        update = operands.hidden.double() @ operands.weight.double().T - hidden.double() @ head.weight.double().T
        expected = head.scaling["default"] * hidden.double() @ down.double().T @ up.double().T
    assert expected.abs().amax() < 1e-2 * (hidden @ head.weight.T).abs().amax()
    torch.testing.assert_close(update, expected, rtol=0.0, atol=2 * 2**-8 * expected.abs().amax().item())


def test_dropout_of_an_adapter_on_the_head() -> None:
    model = adapted("lora", lora_dropout=0.5).train()
    head, hidden = model.get_base_model().lm_head, torch.randn(3, 32)
    torch.manual_seed(1)
    expected = head(hidden)
    torch.manual_seed(1)
    operands = head_operands(hidden, head)
    torch.testing.assert_close(operands.hidden @ operands.weight.T + operands.bias, expected)
    with pytest.raises(ValueError, match=r"must have DoRA without lora_dropout on its LM head, got 0\.5"):
        check_model(adapted("dora", lora_dropout=0.5))


@pytest.mark.parametrize("name", OTHERS)
def test_other_adapters_on_the_head_are_refused_while_they_are_new(name: str) -> None:
    model = peft.get_peft_model(tiny_model_of("llama"), OTHERS[name])
    with pytest.raises(ValueError, match=r"got peft\.tuners\..*: of PEFT's adapters LoRA, DoRA, trainable tokens"):
        check_model(model)


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": False},
    "PromptTuningConfig": {"num_virtual_tokens": 3},
    "PrefixTuningConfig": {"num_virtual_tokens": 3},
}


@pytest.mark.parametrize("kind", PEFT_CONFIGS)
def test_peft_models_have_the_log_probs_of_rows_alone(kind: str) -> None:
    base = tiny_model_of("llama", tie_word_embeddings=True)
    model = peft.get_peft_model(base, getattr(peft, kind)(task_type="CAUSAL_LM", **PEFT_CONFIGS[kind])).eval()
    check_model(model)
    padded = torch.randint(10, 90, (2, 9))
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    with torch.no_grad():
        ours = log_probs(model, input_ids=padded, attention_mask=mask)[:1, -5:]
        alone = padded[:1, 4:]
        expected = model(input_ids=alone, attention_mask=torch.ones_like(alone)).logits[:, -5:].log_softmax(-1)
        torch.testing.assert_close(ours, expected, rtol=0.0, atol=1e-5)
        responses = (torch.arange(9) > 5).expand(2, 9)
        stats = response_stats(model, padded, mask, response_mask=responses).log_probs[0, -3:]
    torch.testing.assert_close(stats, expected[0, 1:4].gather(1, padded[0, 6:, None])[:, 0], rtol=0.0, atol=1e-5)
