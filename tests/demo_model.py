"""The demo's model in small: random, with a token per character."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

EOS = "~"
ALPHABET = [EOS, *map(chr, range(32, 126)), "\n"]
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}{{ 'Answer: ' }}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    characters = Tokenizer(models.WordLevel({text: i for i, text in enumerate(ALPHABET)}, unk_token=" "))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, eos_token=EOS, pad_token=EOS, unk_token=" ", chat_template=CHAT_TEMPLATE
    )


def make_model() -> PreTrainedModel:
    """Random, with tied embeddings like SmolLM2."""
    config = LlamaConfig(
        vocab_size=len(ALPHABET),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()
