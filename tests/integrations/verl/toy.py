"""The toy task of examples/verl: `python -m tests.integrations.verl.toy FOLDER` writes its model, tokenizer and data.

A reply is correct when its first word is one of 24 of 60, whatever the question; a third are, of a model with random
weights, and most after a few steps.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

# verl asks the tokenizer of a Qwen for its newline and its end of a turn.
_SPECIAL = ["<pad>", "<eos>", "<user>", "<assistant>", "<unk>", "\n", "<|im_end|>"]
_NUMBERS = [f"w{index}" for index in range(60)]
# Of the teacher's templates, and of the question.
_TEXT = (
    "Question : Correct solution: Correctly solve the original question. "
    "The following is feedback from your unsuccessful earlier attempt:"
)
_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_CORRECT = 24


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any) -> Any:
    """verl's reward function: the score, and what else it says."""
    words = [word for word in solution_str.split() if word in _NUMBERS]
    correct = bool(words) and int(words[0][1:]) < _CORRECT
    return {"score": float(correct), "acc": float(correct), "feedback": "" if correct else "solve the question."}


def write(folder: Path) -> None:
    import pandas as pd
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*_SPECIAL, *_NUMBERS, *_TEXT.split()]))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")
    ])  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_end|>"],
        model_max_length=512,
    )
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / "model")
    rows = [
        {
            "data_source": "toy",
            "prompt": [{"role": "user", "content": f"Question : w{index % 60} w{7 * index % 60}"}],
            "ability": "toy",
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {"index": index, "split": "train"},
        }
        for index in range(32)
    ]
    pd.DataFrame(rows).to_parquet(folder / "train.parquet")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
