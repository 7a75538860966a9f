"""What the recipes have in common: a small model, rollouts of it, and the loss of a micro-batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

import srpo_kernels as sk


class Rollouts(NamedTuple):
    """``B`` rollouts, padded on the right: ``ids`` and ``teacher_ids`` ``[B, T]``, ``mask`` ``[B, T - 1]``."""

    ids: Tensor
    # True where a response token is to be predicted.
    mask: Tensor
    advantages: Tensor
    sdpo_mask: Tensor
    old_log_probs: Tensor
    # The same responses in the same columns, behind the teacher's prompt.
    teacher_ids: Tensor
    # ``[B, T]``, of the student and of the teacher: 1 at prompt and response, 0 at padding.
    attention_mask: Tensor

    def select(self, rollouts: Tensor | slice) -> Rollouts:
        """Some of the rollouts."""
        return Rollouts._make(x[rollouts] for x in self)


def make_policy(*, tied: bool = False, seed: int = 0) -> Qwen3ForCausalLM:
    """A model of 97 words, with or without a head that is its embedding."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=tied))


def make_teacher(policy: nn.Module) -> nn.Module:
    """A model near the policy, in the place of its moving average."""
    teacher = copy.deepcopy(policy).requires_grad_(False)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return teacher


def make_rollouts(count: int, length: int = 9, seed: int = 0) -> Rollouts:
    """Rollouts of unequal lengths, one of them empty; the first third is distilled."""
    generator = torch.Generator().manual_seed(seed)
    ids, teacher_ids = torch.randint(0, 97, (2, count, length), generator=generator)
    lengths = torch.randint(1, length - 3, (count,), generator=generator)
    lengths[-1] = 0
    positions = torch.arange(length - 1)
    mask = (positions >= 2) & (positions < 2 + lengths[:, None])
    teacher_ids[:, 3:] = ids[:, 3:]
    return Rollouts(
        ids,
        mask,
        torch.randn(count, generator=generator),
        torch.arange(count) < count // 3,
        -4.5 + 0.3 * torch.randn(mask.shape, generator=generator),
        teacher_ids,
        (torch.arange(length) < 3 + lengths[:, None]).long(),
    )


def micro_batch_loss(
    model: nn.Module,
    batch: Rollouts,
    teacher: nn.Module,
    normalizers: sk.Normalizers | None,
    config: sk.SRPOConfig,
) -> sk.SRPOOutput:
    """The loss of a micro-batch, from the model's hidden states and its head."""
    hidden = last_hidden_states(model, batch.ids, batch.attention_mask)
    return head_loss(hidden, model.lm_head, batch, teacher, normalizers, config)


def last_hidden_states(model: nn.Module, ids: Tensor, attention_mask: Tensor) -> Tensor:
    """``[B, T, H]``. Positions count tokens alone, so that padding on the left would do as well."""
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    outputs = model.model(ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
    return outputs.last_hidden_state


def head_loss(
    hidden: Tensor,
    head: nn.Linear,
    batch: Rollouts,
    teacher: nn.Module,
    normalizers: sk.Normalizers | None,
    config: sk.SRPOConfig,
) -> sk.SRPOOutput:
    """The loss of a micro-batch, from hidden states ``[B, T, H]``."""
    return sk.srpo_loss(
        hidden[:, :-1],
        head.weight,
        batch.ids[:, 1:],
        advantages=batch.advantages,
        mask=batch.mask,
        sdpo_mask=batch.sdpo_mask,
        teacher_hidden=teacher_states(teacher, batch),
        teacher_weight=teacher.lm_head.weight,
        old_log_probs=batch.old_log_probs,
        normalizers=normalizers,
        config=config,
    )


@torch.no_grad()
def teacher_states(teacher: nn.Module, batch: Rollouts) -> Tensor:
    """The teacher's states at the routed rollouts alone, ``[B_sdpo, T - 1, H]``."""
    routed = batch.sdpo_mask.nonzero().flatten()
    # The forward of a sharded teacher is a collective: a rank without a routed rollout takes part in it.
    rows = routed if len(routed) else slice(1)
    return last_hidden_states(teacher, batch.teacher_ids[rows], batch.attention_mask[rows])[: len(routed), :-1]


def global_normalizers(teacher: nn.Module, micro_batches: Sequence[Rollouts], config: sk.SRPOConfig) -> sk.Normalizers:
    """The normalizers of all micro-batches of all ranks: one collective of 32 bytes per rank, for every rank."""
    parts = []
    for batch in micro_batches:
        stats = sk.teacher_stats(teacher_states(teacher, batch), teacher.lm_head.weight, config=config)
        parts.append(sk.Normalizers.from_batch(batch.mask, batch.sdpo_mask, stats.entropy, config=config))
    return parts[0].merge(*parts[1:]).all_reduce()
