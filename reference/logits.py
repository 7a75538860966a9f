"""From hidden states to logits, log-probabilities and entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# What a logit of minus infinity counts as: 0 · LOWEST is 0, so a token that both models exclude adds nothing.
LOWEST = -1e30

Project = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``[n, H]``, ``[V, H]`` and ``[V]`` or None to ``hidden @ weight.T + bias``, ``[n, V]`` in fp32 or fp64."""


def working_dtype(values: Tensor) -> torch.dtype:
    """fp64 stays fp64; everything else is computed in fp32, because bf16 logits spoil the gradients."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def transform(x: Tensor, *, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """``softcap · tanh(x · logit_scale / softcap) / temperature``, or ``x · logit_scale / temperature``."""
    return softcapped(x * logit_scale, softcap) / temperature


def softcapped(x: Tensor, softcap: float | None) -> Tensor:
    """``softcap · tanh(x / softcap)``, or x itself without a cap."""
    return x if softcap is None else softcap * torch.tanh(x / softcap)


class AtLeastLowest(torch.autograd.Function):
    """``max(x, LOWEST)`` with a gradient of 1 everywhere, as softmax itself has at minus infinity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(min=LOWEST)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def project_wide(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``hidden @ weight.T + bias``, operands and result in ``working_dtype``."""
    dtype = working_dtype(hidden)
    x = hidden.to(dtype) @ weight.to(dtype).T
    return x if bias is None else x + bias.to(dtype)


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    project: Project = project_wide,
) -> Tensor:
    """``transform(max(hidden @ weight.T + bias, LOWEST))``: ``[n, H]`` and ``[V, H]`` to ``[n, V]``, fp32 or fp64.

    ``project`` computes the matmul: another one rounds as some device or trainer does.
    """
    x = AtLeastLowest.apply(project(hidden, weight, bias))
    return transform(x, temperature=temperature, logit_scale=logit_scale, softcap=softcap)


def teacher_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    teacher_transform: Any = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    project: Project = project_wide,
) -> Tensor:
    """``head_logits`` of a teacher, detached: of the student's transform, or of its own, which has the same fields.

    What ``LOWEST`` is for the student, it is for the teacher too: both then count minus infinity alike.
    """
    if teacher_transform is None:
        own: dict[str, Any] = {"temperature": temperature, "logit_scale": logit_scale, "softcap": softcap}
        return head_logits(hidden, weight, bias, **own, project=project).detach()
    names = ("temperature", "logit_scale", "softcap")
    own = {name: getattr(teacher_transform, name) for name in names}
    lowest = LOWEST * (logit_scale if softcap is None else softcap) / temperature
    return head_logits(hidden, weight, bias, **own, project=project).detach().clamp(min=lowest)


def select_heads(
    hidden: Tensor, weight: Any, bias: Any, head_ids: Tensor | None, student: tuple[Tensor, Tensor | None]
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """The rows, weight and bias of each head of a teacher: of one head all rows, of a list those it is named for."""
    if head_ids is None:
        return [(torch.arange(len(hidden), device=hidden.device), *teacher_head(*student, weight, bias))]
    biases = [None] * len(weight) if bias is None else bias
    return [
        ((head_ids == i).nonzero()[:, 0], *teacher_head(*student, own, own_bias))
        for i, (own, own_bias) in enumerate(zip(weight, biases, strict=True))
    ]


def teacher_head(
    weight: Tensor, bias: Tensor | None, teacher_weight: Tensor | None, teacher_bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The teacher's own weight and bias, or the student's where it has none."""
    return (weight, bias) if teacher_weight is None else (teacher_weight, teacher_bias)


def restricted(logits: Tensor, support_ids: Tensor, target_ids: Tensor) -> Tensor:
    """The logits of the tokens that a row was sampled from, its own among them; all others are ``LOWEST``.

    A negative id is none.
    """
    vocabulary = logits.shape[-1]
    ids = torch.cat([torch.where(support_ids >= 0, support_ids, vocabulary), target_ids[:, None]], dim=1)
    allowed = torch.zeros(len(logits), vocabulary + 1, dtype=torch.bool, device=logits.device).scatter(1, ids, True)
    return logits.masked_fill(~allowed[:, :vocabulary], LOWEST)


def select_log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """``log p`` of K given tokens per row: ``[n, V]`` and ``[n, K]`` to ``[n, K]``."""
    return logits.log_softmax(-1).gather(-1, ids)


def token_log_probs(logits: Tensor, target_ids: Tensor) -> Tensor:
    """``log p`` of the sampled token: ``[n, V]`` and ``[n]`` to ``[n]``."""
    return select_log_probs(logits, target_ids[:, None])[:, 0]


def entropy(logits: Tensor) -> Tensor:
    """``H(p) = -Σ_v p_v log p_v`` in nats over the full vocabulary: ``[n, V]`` to ``[n]``."""
    return log_prob_entropy(logits.log_softmax(-1))


def log_prob_entropy(log_p: Tensor) -> Tensor:
    """The same of log-probabilities that are there already."""
    return -(log_p.exp() * log_p).sum(-1)
