"""Replies of the study's small model: where prompts have one length, without what ``generate`` costs a token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from examples.rollouts import Rollouts, encode_chats, response_mask, sample_rollouts


def sample(model: Any, tokenizer: Any, questions: list[str], group_size: int, longest: int) -> Rollouts:
    """``group_size`` replies of at most ``longest`` tokens to each question, at temperature 1, siblings together."""
    prompt_ids, prompt_mask = encode_chats(tokenizer, questions)
    if not prompt_mask.all():
        return sample_rollouts(
            model, tokenizer, questions, group_size=group_size, max_new_tokens=longest, temperature=1.0
        )
    response_ids = _decode(model, prompt_ids, group_size, longest, tokenizer.eos_token_id)
    return Rollouts(
        prompt_ids.repeat_interleave(group_size, 0),
        prompt_mask.repeat_interleave(group_size, 0),
        response_ids,
        response_mask(response_ids, tokenizer.eos_token_id),
        tokenizer.batch_decode(response_ids, skip_special_tokens=True),
    )


@torch.inference_mode()
def _decode(model: Any, prompt_ids: Tensor, group_size: int, longest: int, eos_id: int) -> Tensor:
    """Sampled ids ``[B, T]`` of a Qwen3, prompts ``[P, L]`` without padding; ``eos_id`` after the end."""
    core, prompt_length = model.model, prompt_ids.shape[1]
    outputs = core(input_ids=prompt_ids, use_cache=True)
    batch = len(prompt_ids) * group_size
    caches = [
        [_roomy(past, group_size, longest) for past in (layer.keys, layer.values)]
        for layer in outputs.past_key_values.layers
    ]
    hidden = outputs.last_hidden_state[:, -1].repeat_interleave(group_size, 0)
    cosines, sines = (table[0] for table in core.rotary_emb(hidden, torch.arange(prompt_length + longest)[None]))
    ids = torch.full((batch, longest), eos_id)
    done = torch.zeros(batch, dtype=torch.bool)
    for column in range(longest):
        token = torch.multinomial(model.lm_head(hidden).softmax(-1), 1)[:, 0].masked_fill(done, eos_id)
        ids[:, column] = token
        done |= token == eos_id
        if done.all():
            return ids[:, : column + 1].clone()
        position = prompt_length + column
        hidden = core.embed_tokens(token)
        for layer, cache in zip(core.layers, caches, strict=True):
            attended = _attend(layer.self_attn, layer.input_layernorm(hidden), cache, position, cosines, sines)
            hidden = hidden + attended
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        hidden = core.norm(hidden)
    return ids.clone()


def _roomy(past: Tensor, group_size: int, longest: int) -> Tensor:
    """Keys or values ``[P, heads, L, D]`` of the prompts, for each sibling, with room for its reply."""
    room = past.new_zeros(len(past) * group_size, past.shape[1], past.shape[2] + longest, past.shape[3])
    room[:, :, : past.shape[2]] = past.repeat_interleave(group_size, 0)
    return room


def _attend(attention: Any, x: Tensor, cache: list[Tensor], position: int, cosines: Tensor, sines: Tensor) -> Tensor:
    """One token's attention, ``[B, H]``; queries that share a head of keys are that head's rows."""
    keys, values = cache
    batch, heads, _, width = keys.shape
    query = _rotate(attention.q_norm(attention.q_proj(x).view(batch, -1, width)), cosines[position], sines[position])
    key = _rotate(attention.k_norm(attention.k_proj(x).view(batch, -1, width)), cosines[position], sines[position])
    keys[:, :, position] = key
    values[:, :, position] = attention.v_proj(x).view(batch, heads, width)
    seen = slice(position + 1)
    mixed = scaled_dot_product_attention(query.view(batch, heads, -1, width), keys[:, :, seen], values[:, :, seen])
    return attention.o_proj(mixed.reshape(batch, -1))  # type: ignore[no-any-return]


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cosine + torch.cat([-x[..., half:], x[..., :half]], -1) * sine
