"""Every causal architecture of the installed transformers, small enough to run in a test."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from srpo_kernels.integrations.transformers import call_with_hidden, causal_model, head_operands, logit_transform

ARCHITECTURES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCAB = 96
LAYERS = 4

# The largest value of every field of this name.
SIZES = {
    r"\w*vocab(_size\w*)?": VOCAB,
    r"\w*(hidden|embedding|ffn|feed_forward|ff|intermediate|mlp)_(size|dim)|\w*embed_dim|d_model|n_embd|dim": 32,
    r"word_embed_proj_dim|emb_dim|n_inner|dim_ff|dff|d_ff|qk_head_dim|lru_width": 32,
    r"(num_)?\w*layers|n_layers?|num_blocks": LAYERS,
    r"\w*head_dim|mamba_d_head|mamba_headdim": 16,
    r"mamba_n_heads|mamba_num_heads|n_mamba_heads": 4,
    r"\w*heads?|multi_query_num": 2,
    r"\w*d_state|\w*state_size|\w*lora_rank|\w*rank": 16,
    r"rotary_dim|qk_rope_head_dim|chunk_size": 8,
    r"\w*num_(local_|routed_)?experts|n_routed_experts|zero_expert_num": 4,
    r"\w*experts_per_tok(en)?|moe_topk|moe_k|num_selects|num_layers_per_stack|num_kv_shared_layers": 2,
    r"n_groups?|topk_group|num_expert_group": 1,
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 1e4}
SHARED_ATTENTION = {
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_hidden_size": 64,
    "attention_head_dim": 32,
}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
# Fields that no rule gives a value that the architecture takes; those of a part are named with it.
FIELDS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "bert-generation": {"is_decoder": True},
    "blenderbot": {"num_hidden_layers": LAYERS},
    "codegen": {"n_head": 4, "rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": DEFAULT_ROPE}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_unified_assistant": {"text_config.num_kv_shared_layers": 0},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hrm_text": {"num_hidden_layers": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4},
    "mimo_v2_flash": {"num_attention_heads": 4},
    "minicpm3": {"dim_model_base": 32},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": INDEXER,
    "qwen4_exp_text": INDEXER,
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local"] * LAYERS},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": SHARED_ATTENTION,
    "zamba2": SHARED_ATTENTION | {"hybrid_layer_ids": [1, 3]},
}


def tiny_model_of(architecture: str, **fields: Any) -> PreTrainedModel:
    """A random model in evaluation mode, whose logits are about 2 in size; ``fields`` go to its config."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[architecture]()
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    # A language model that is part of another model may have the config of a part.
    config = config if isinstance(config, model_class.config_class) else model_class.config_class()
    shrink(config)
    for name, value in (FIELDS.get(architecture, {}) | fields).items():
        *parts, field = name.split(".")
        setattr(functools.reduce(getattr, parts, config), field, value)
    model: PreTrainedModel = model_class(config).eval()
    for weight in model.get_output_embeddings().parameters():
        nn.init.normal_(weight, std=2.0 * weight.shape[-1] ** -0.5)
    return model


def log_probs(model: Any, **inputs: Any) -> Tensor:
    """From the hidden states and the head of a model, ``[B, S, V]``."""
    hidden, weight, bias = call_with_hidden(model, lambda *args: head_operands(*args, in_head_dtype=True), **inputs)
    transform = logit_transform(causal_model(model).config)
    logits = nn.functional.linear(hidden, weight, bias) * transform.logit_scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    return logits.log_softmax(-1)


def shrink(config: PretrainedConfig) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            shrink(value)
        elif isinstance(value, list) and len(value) > LAYERS and "layer" in name:
            # Every kind of layer has to be among the first.
            kinds = dict.fromkeys(value) if isinstance(value[0], str) else ()
            setattr(config, name, [*kinds, *value][:LAYERS])
        elif type(value) is int:
            size = next((size for pattern, size in SIZES.items() if re.fullmatch(pattern, name)), value)
            setattr(config, name, min(value, 3 if name.endswith("_token_id") and value >= VOCAB else size))
