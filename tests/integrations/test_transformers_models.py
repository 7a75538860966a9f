"""Every causal architecture of transformers: hidden states and head make its own log-probs, or it is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", "5", reason="the integration needs transformers >= 5")

import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import srpo_kernels as sk
from srpo_kernels.integrations.transformers import check_model, logit_transform, response_stats
from srpo_kernels.integrations.transformers.head import DIVISORS, FACTORS, SOFTCAPS
from tests.tiny_models import ARCHITECTURES, log_probs, tiny_model_of

# Positions that are learnt, counted from a mask or an offset, rotary, in the attention's bias, or a state's.
ACCEPTED = (
    *("gpt2", "gpt_bigcode", "gpt_neo", "ctrl", "xglm", "biogpt", "llama", "llama4", "qwen3", "gemma2", "gemma3_text"),
    *("granite", "cohere", "phi", "opt", "falcon", "bloom", "mpt", "recurrent_gemma", "mamba", "rwkv", "bart"),
    *("minicpm3", "hyperclovax", "falcon_h1", "xlstm"),
)
REFUSED = {
    "bert": "model must compute its logits",
    "modernbert-decoder": "model must compute its logits",
    "prophetnet": r"those of ProphetNetForCausalLM are \[1, 8, 96\], the product is \[1, 2, 8, 96\]",
    "xlnet": "model must be causal",
    "cpmant": "model must be causal",
}
# What keeps a tiny model of it from being built or run by itself on a CPU.
NOT_TINY = {
    "blt": "'BltConfig' object has no attribute 'num_hidden_layers'",
    "dbrx": "'DbrxAttentionConfig' object has no attribute 'rope_theta'",
    "dots3_note": "Layer type 'indexed_attention' is not homogeneous across layers",
    "dots3_note_text": "Layer type 'indexed_attention' is not homogeneous across layers",
    "gemma3n": "TimmWrapperModel requires the timm library",
    "gemma4_assistant": "hidden_size_per_layer_input must be 0, got 256",
    # A drafter, which reads the keys and values of another model.
    "gemma4_unified_assistant": "inputs_embeds and shared_kv_states cannot be None",
}
OTHERS = tuple(name for name in ARCHITECTURES if name not in (*ACCEPTED, *REFUSED, *NOT_TINY))

# Of 3, 8 and 5 tokens, with padding before them, behind them, and on both sides.
STARTS, LENGTHS, WIDTH = (0, 2, 3), (3, 8, 5), 10


def config_of(transform: sk.LogitTransform) -> sk.SRPOConfig:
    return sk.SRPOConfig(logit_scale=transform.logit_scale, softcap=transform.softcap)


@torch.no_grad()
def padding_error(model: Any, **options: Any) -> float:
    """How far the log-probs of padded rows are from those that the model itself gives the rows alone.

    Of the whole vocabulary, and of the tokens that are there by `response_stats`.
    """
    padded = torch.randint(10, 90, (3, WIDTH))
    mask = torch.zeros_like(padded)
    for row, (start, length) in enumerate(zip(STARTS, LENGTHS, strict=True)):
        mask[row, start : start + length] = 1
    ours = log_probs(model, input_ids=padded, attention_mask=mask, **options)
    # All but the first of a row.
    responses = (mask == 1) & (mask.cumsum(1) > 1)
    tokens = response_stats(model, padded, mask, response_mask=responses, **options).log_probs
    errors = []
    for row in range(3):
        valid = mask[row].bool()
        expected = model(input_ids=padded[row : row + 1, valid]).logits.float().log_softmax(-1)[0]
        errors.append((ours[row, valid] - expected).abs().max().item())
        own = expected[:-1].gather(1, padded[row, valid][1:, None])[:, 0]
        errors.append((tokens[row][responses[row]] - own).abs().max().item())
    return max(errors)


@pytest.mark.parametrize("name", ACCEPTED)
def test_padded_rows_have_the_log_probs_of_rows_alone(name: str) -> None:
    model = tiny_model_of(name)
    check_model(model)
    assert padding_error(model) < 1e-5


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_does_something_else_is_refused(name: str) -> None:
    model = tiny_model_of(name)
    with pytest.raises(ValueError, match=REFUSED[name]):
        check_model(model)


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_architecture_has_right_log_probs_or_is_refused(name: str) -> None:
    model = tiny_model_of(name)
    try:
        check_model(model)
    except ValueError as refusal:
        assert str(refusal).startswith("model must ")
    else:
        assert padding_error(model) < 1e-5


@pytest.mark.parametrize("name", NOT_TINY)
def test_the_architectures_without_a_tiny_model_still_have_none(name: str) -> None:
    with pytest.raises(Exception, match=NOT_TINY[name]):
        tiny_model_of(name)(input_ids=torch.arange(1, 9)[None])


TRANSFORMS: dict[str, tuple[dict[str, float], sk.LogitTransform]] = {
    "cohere": ({"logit_scale": 0.3}, sk.LogitTransform(1.0, 0.3)),
    "falcon_h1": ({"lm_head_multiplier": 0.3}, sk.LogitTransform(1.0, 0.3)),
    "granite": ({"logits_scaling": 3.0}, sk.LogitTransform(1.0, 1 / 3.0)),
    "granitemoehybrid": ({"logits_scaling": 3.0}, sk.LogitTransform(1.0, 1 / 3.0)),
    "hyperclovax": ({"logits_scaling": 3.0}, sk.LogitTransform(1.0, 3.0)),
    "inkling_text": ({"logits_mup_width_multiplier": 3.0}, sk.LogitTransform(1.0, 1 / 3.0)),
    "minicpm3": ({"dim_model_base": 10}, sk.LogitTransform(1.0, 10 / 32)),
    "mpt": ({"logit_scale": 0.3}, sk.LogitTransform(1.0, 1.0)),
    "gemma2": ({"final_logit_softcapping": 20.0}, sk.LogitTransform(1.0, 1.0, 20.0)),
    "inkling2_text": ({"final_logit_softcapping": 20.0}, sk.LogitTransform(1.0, 1.0, 20.0)),
    "nanochat": ({"final_logit_softcapping": 20.0}, sk.LogitTransform(1.0, 1.0, 20.0)),
    "recurrent_gemma": ({"logits_soft_cap": 20.0}, sk.LogitTransform(1.0, 1.0, 20.0)),
    "xlstm": ({"output_logit_soft_cap": 20.0}, sk.LogitTransform(1.0, 1.0, 20.0)),
}


# xLSTM and the second Inkling do not run in bf16 alone.
IN_BF16 = [name for name in TRANSFORMS if name not in ("inkling2_text", "xlstm")]


@pytest.mark.parametrize(
    "name, dtype", [*((name, torch.float32) for name in TRANSFORMS), *((name, torch.bfloat16) for name in IN_BF16)]
)
def test_scales_and_softcaps_have_to_be_known(name: str, dtype: torch.dtype) -> None:
    fields, transform = TRANSFORMS[name]
    model = tiny_model_of(name, **fields).to(dtype)
    assert logit_transform(model.config) == pytest.approx(transform)
    check_model(model, config_of(transform))
    _, scale, softcap = transform
    for wrong in (sk.LogitTransform(1.0, 1.1 * scale, softcap), sk.LogitTransform(1.0, scale, 25.0)):
        with pytest.raises(ValueError, match="model must compute its logits"):
            check_model(model, config_of(wrong))


def test_a_refusal_says_what_the_model_does() -> None:
    model = tiny_model_of("recurrent_gemma").bfloat16()
    with pytest.raises(
        ValueError, match=r"RecurrentGemmaForCausalLM makes -?30 of a product of -?1.638e\+04, where Logit"
    ):
        check_model(model, config_of(sk.LogitTransform(1.0, 1.0)))


def test_every_name_of_a_scale_or_softcap_in_transformers_is_known() -> None:
    # Of losses and generation, and Inkling's module that applies `final_logit_softcapping`.
    known = {"logits", "router_logits", "output_router_logits", "num_logits_to_keep", "_get_logits_processor"}
    known |= {"guidance_scale", "logit_softcap", *FACTORS, *DIVISORS, *SOFTCAPS}
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    classes = {one for name in names for one in ([name] if isinstance(name, str) else name)}
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for name, source in re.findall(r"^class (\w+)(.*?)(?=^\S|\Z)", path.read_text(), re.DOTALL | re.MULTILINE):
            if name in classes:
                assert set(re.findall(r"\.(\w*(?:logit|cap|scal|mult|mup)\w*)", source)) <= known, name
                classes.remove(name)
    # Subclasses of another model's class, which are empty.
    assert len(classes) < 10


@pytest.fixture
def flash_attention() -> Iterator[str]:
    """Refuses fp32 where flash attention does, and computes as another."""

    def attention(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        # transformers casts what a norm has made fp32 to autocast's dtype, or to that of the weights.
        if query.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        return sdpa_attention_forward(module, query, *args, **kwargs)

    name = "stand_in_for_flash_attention"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    yield name
    del AttentionInterface._global_mapping[name], AttentionMaskInterface._global_mapping[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_flash_attention_is_checked_in_a_dtype_that_it_takes(
    dtype: torch.dtype, flash_attention: str
) -> None:
    model = tiny_model_of("gemma3_text", final_logit_softcapping=20.0).to(dtype)
    model.config._attn_implementation = flash_attention
    check_model(model)
    with pytest.raises(ValueError, match="model must compute its logits"):
        check_model(model, config_of(sk.LogitTransform(1.0, 1.0)))
    assert model.lm_head.weight.dtype == dtype


def test_it_leaves_the_model_as_it_was() -> None:
    model = tiny_model_of("llama", attention_dropout=0.5).train()
    model.lm_head.forward = forward = model.lm_head.forward
    check_model(model, config_of(sk.LogitTransform(1.0, 1.0)))
    assert model.training and model.lm_head.__dict__["forward"] is forward
    with pytest.raises(ValueError, match="model must compute its logits"):
        check_model(model, config_of(sk.LogitTransform(1.0, 2.0)))
    assert model.training and model.lm_head.__dict__["forward"] is forward


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        if isinstance(result, Tensor) and not result._is_view():
            self.bytes = max(self.bytes, result.nbytes)
        return result


def test_it_does_not_copy_a_large_head() -> None:
    model = tiny_model_of("llama", vocab_size=100_000, hidden_size=64).bfloat16()
    with LargestTensor() as largest:
        check_model(model, config_of(sk.LogitTransform(1.0, 1.0)))
    # A slice of 8,192 rows, or the logits of eight tokens, in fp32; the head itself has 12.8 MB.
    assert largest.bytes <= 4 * max(8192 * 64, 8 * 100_000)


def test_positions_and_embeddings_that_are_given_stay_with_their_tokens() -> None:
    model, ids = tiny_model_of("gpt2"), torch.randint(10, 90, (1, 6))
    with torch.no_grad():
        expected = model(input_ids=ids, position_ids=torch.arange(4, 10)[None]).logits.log_softmax(-1)
        padded = torch.cat([ids.new_zeros(1, 2), ids], 1)
        mask = (padded != 0).long()
        positions = torch.arange(2, 10)[None]
        ours = log_probs(model, input_ids=padded, attention_mask=mask, position_ids=positions)
        embedded = model.get_input_embeddings()(padded)
        same = log_probs(model, inputs_embeds=embedded, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(ours[:, 2:], expected)
    torch.testing.assert_close(same[:, 2:], expected)


def test_a_row_of_padding_alone_is_finite() -> None:
    model, ids = tiny_model_of("gpt2"), torch.randint(10, 90, (2, 4))
    mask = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 0]])
    assert log_probs(model, input_ids=ids, attention_mask=mask).isfinite().all()
    assert log_probs(model, input_ids=ids[:1], attention_mask=mask[:1]).shape == (1, 4, 96)
