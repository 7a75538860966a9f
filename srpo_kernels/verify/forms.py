"""Edits of a case's inputs: numbers that each row has of its own."""

from __future__ import annotations

import math

import torch

from srpo_kernels.verify.inputs import Inputs

_TOKENS = 5


def likeliest(inputs: Inputs) -> Inputs:
    """The teacher's likeliest tokens in place of its hidden states; the last is missing in every other row."""
    heads = ("weight", "bias", "teacher_weight", "teacher_bias")
    head = reference.logits.teacher_head(*(inputs[name] for name in heads))
    logits = reference.logits.head_logits(inputs["teacher_hidden"].flatten(0, -2), *head)
    top = logits.log_softmax(-1).topk(min(_TOKENS, logits.shape[-1]))
    ids = top.indices.clone()
    ids[::2, 1:][:, -1:] = -1
    shape = inputs["target_ids"].shape
    given = {"teacher_topk_ids": ids.view(*shape, -1), "teacher_topk_log_probs": top.values.view(*shape, -1)}
    return inputs | given | dict.fromkeys(("teacher_hidden", "teacher_weight", "teacher_bias"))


def sampled_support(inputs: Inputs) -> Inputs:
    """A few tokens that each row was sampled from, its own among them in every other row."""
    ids = _distinct(inputs["target_ids"].flatten(), len(inputs["weight"]))
    return inputs | {"support_ids": ids.view(*inputs["target_ids"].shape, -1)}


def likeliest_and_support(inputs: Inputs) -> Inputs:
    """Both."""
    return sampled_support(likeliest(inputs))


def _distinct(target_ids: Tensor, vocab_size: int) -> Tensor:
    """``[n, K]``: ids that follow the target, without itself in every other row, -1 where the vocabulary ends."""
    step = torch.arange(_TOKENS) + (torch.arange(len(target_ids)) % 2)[:, None]
    ids = target_ids[:, None] + step
    return ids.masked_fill(ids >= vocab_size, -1)


def own_divergences(inputs: Inputs) -> Inputs:
    """A jsd of each row's own, the KLs among them, and a bound of its entries."""
    rows = inputs["target_ids"].shape
    count = torch.arange(inputs["target_ids"].numel()).view(rows)
    alphas, clips = torch.tensor([0.0, 0.3, 1.0, 0.5]), torch.tensor([0.01, math.inf, 0.1])
    return inputs | {"divergence_alpha": alphas[count % 4], "divergence_clip": clips[count % 3]}


def rollout(inputs: Inputs) -> Inputs:
    """Log-probs of a rollout engine that is a little off; one is not known."""
    count = torch.arange(inputs["target_ids"].numel()).view(inputs["target_ids"].shape)
    log_probs = inputs["old_log_probs"] + 0.3 * torch.sin(7.0 * count)
    log_probs.view(-1)[1] = math.nan
    return inputs | {"rollout_log_probs": log_probs}
