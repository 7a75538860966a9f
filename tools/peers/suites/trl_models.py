"""Stand-ins for the tiny models that TRL's tests load from a hub, in the layout of its cache."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

_SPECIAL = {151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>"}
_TOOLS = {151657: "<tool_call>", 151658: "</tool_call>", 151665: "<tool_response>", 151666: "</tool_response>"}
_THINK = {151667: "<think>", 151668: "</think>"}
# What completions in their tests are made of, as Qwen2's vocabulary has it; its first 256 are the bytes.
_PIECES = {
    293: "Ġb", 314: "Ġ{", 330: 'Ġ"', 397: ">Ċ", 411: "out", 450: "dec", 497: '",', 522: "</", 606: "name", 788: '":',
    894: "Ġany", 927: "sh", 944: "'t", 1318: "text", 1414: "Ġknow", 1513: "Ġdon", 2765: "Ġwon", 4913: '{"', 5212: 'Ġ{"',
    5392: "Ġtool", 6023: "hi", 6659: "call", 7692: "async", 9520: "step", 11248: "}}Ċ", 13477: "rement", 14172: "tool",
    16252: "Ġincrement", 16370: "arguments", 17453: "Done", 22785: "_tool", 35744: "increment", 64648: "multiply",
    93054: "_multiply", 95642: '"}}Ċ',
}  # fmt: skip
_VOCABULARY = 151_680
_SIZES: dict[str, Any] = {
    "hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": _VOCABULARY, "pad_token_id": 151643, "eos_token_id": 151645,
    "bos_token_id": None,
}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
# From the name of a repository to the class, what its config has beside the sizes, and the chat template.
_MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2ForCausalLM", {}, "qwen2_5"),
    "tiny-Qwen2ForSequenceClassification-2.5": ("Qwen2ForSequenceClassification", {"num_labels": 1}, "qwen2_5"),
    "tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", {"head_dim": 8}, "qwen3"),
    "tiny-Qwen3ForSequenceClassification": ("Qwen3ForSequenceClassification", {"num_labels": 1}, "qwen3"),
    "tiny-Qwen3MoeForCausalLM": ("Qwen3MoeForCausalLM", {"num_experts": 4, "head_dim": 8, **_EXPERTS}, "qwen3"),
    "tiny-LlamaForCausalLM-3.2": ("LlamaForCausalLM", {}, "qwen2_5"),
    "tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", {"num_labels": 1}, "qwen2_5"),
    "tiny-MistralForCausalLM-0.2": ("MistralForCausalLM", {}, "qwen2_5"),
    "tiny-Gemma2ForCausalLM": ("Gemma2ForCausalLM", {"head_dim": 8}, "qwen2_5"),
    "tiny-Cohere2ForCausalLM": ("Cohere2ForCausalLM", {"logit_scale": 0.25}, "qwen2_5"),
    "tiny-Glm4MoeForCausalLM": ("Glm4MoeForCausalLM", {"n_routed_experts": 4, "head_dim": 2, **_EXPERTS}, "qwen2_5"),
    "tiny-GptOssForCausalLM": ("GptOssForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}, "qwen2_5"),
}


def save_all(folder: str) -> None:
    """Save every model with its tokenizer below ``folder``, a hub's cache."""
    tokenizer = _tokenizer()
    for name, (class_name, fields, template) in _MODELS.items():
        repository = Path(folder, f"models--trl-internal-testing--{name}")
        snapshot = repository / "snapshots" / "local"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("local")
        _model(class_name, fields).save_pretrained(snapshot)
        tokenizer.chat_template = (importlib.resources.files("trl") / f"chat_templates/{template}.jinja").read_text()
        tokenizer.save_pretrained(snapshot)


def _model(class_name: str, fields: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model_class = getattr(transformers, class_name)
    model = model_class(model_class.config_class(**_SIZES, **fields))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return model.bfloat16()


def _tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, which it encodes text as, and the pieces, which it decodes."""
    kept = {**_PIECES, **_SPECIAL, **_TOOLS, **_THINK}
    # The order in which byte-level vocabularies number the bytes.
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(letter) for letter in letters] + [chr(256 + n) for n in range(256 - len(letters))]
    pieces = {index: f"<unused{index}>" for index in range(256, _VOCABULARY)} | dict(enumerate(alphabet)) | kept
    inner = Tokenizer(models.BPE({piece: index for index, piece in pieces.items()}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([*_SPECIAL.values()])
    inner.add_tokens([*_TOOLS.values(), *_THINK.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|endoftext|>", eos_token="<|im_end|>", padding_side="left"
    )
