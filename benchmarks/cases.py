"""What is measured: LM heads, kinds of batches, and the batches themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

import srpo_kernels as sk

HeadName = Literal["qwen3-0.6b", "smollm2-135m", "tiny"]
Workload = Literal["policy", "distillation", "routed"]

CONFIG = sk.SRPOConfig()

PADDING = 0.35
SDPO_SEQUENCES = 0.4
# Of the policy sequences.
ZERO_ADVANTAGE = 0.3

_SEQUENCES = 32
_LOGIT_STD = 2.5
_TEACHER_NOISE = 0.5
_OLD_LOG_PROB_NOISE = 0.2
# Few enough that preparing a batch needs less memory than any provider does.
_ROWS_PER_BLOCK = 32


class Head(NamedTuple):
    """An LM head and how many positions (``B * T``) are measured on it."""

    hidden_size: int
    vocab_size: int
    rows: int


HEADS: dict[HeadName, Head] = {
    "qwen3-0.6b": Head(1_024, 151_936, 512),
    "smollm2-135m": Head(576, 49_152, 1_024),
    "tiny": Head(32, 500, 128),
}


@dataclass(frozen=True)
class Case:
    """One head under one kind of batch: all policy rows, all distillation rows, or a mix with padding."""

    head: HeadName
    workload: Workload
    rows: int

    @property
    def shape(self) -> Head:
        return HEADS[self.head]._replace(rows=self.rows)

    @property
    def name(self) -> str:
        return f"{self.head}/{self.workload}"


@dataclass(frozen=True)
class Batch:
    """``B`` sequences of ``T`` response positions in fp32; ``hidden`` and ``weight`` are leaves."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    target_ids: Tensor
    mask: Tensor
    sdpo_mask: Tensor
    advantages: Tensor
    old_log_probs: Tensor

    @property
    def policy_rows(self) -> Tensor:
        """Valid rows of the policy branch, bool ``[B, T]``."""
        return self.mask & ~self.sdpo_mask[:, None]

    @property
    def active_policy_rows(self) -> Tensor:
        """Those that can move a weight."""
        return self.policy_rows & (self.advantages != 0)[:, None]

    @property
    def sdpo_rows(self) -> Tensor:
        """Valid rows of the distillation branch, bool ``[B, T]``."""
        return self.mask & self.sdpo_mask[:, None]


def make_batch(case: Case, seed: int = 0) -> Batch:
    """A random batch whose logits, teacher and old log-probs are about as far apart as a training step's."""
    if case.rows <= 0 or case.rows % _SEQUENCES:
        raise ValueError(f"rows must be a positive multiple of {_SEQUENCES} sequences, got {case.rows}")
    generator = torch.Generator().manual_seed(seed)
    sequences, length = _SEQUENCES, case.rows // _SEQUENCES
    hidden = torch.randn(sequences, length, case.shape.hidden_size, generator=generator)
    weight = torch.randn(case.shape.vocab_size, case.shape.hidden_size, generator=generator)
    weight.mul_(_LOGIT_STD / math.sqrt(case.shape.hidden_size))
    target_ids = torch.randint(case.shape.vocab_size, (sequences, length), generator=generator)
    log_probs = _log_probs(hidden, weight, target_ids)
    batch = Batch(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        teacher_hidden=hidden.detach() + _TEACHER_NOISE * torch.randn(hidden.shape, generator=generator),
        target_ids=target_ids,
        mask=torch.ones(sequences, length, dtype=torch.bool),
        sdpo_mask=torch.full((sequences,), case.workload == "distillation"),
        advantages=torch.randn(sequences, generator=generator),
        old_log_probs=log_probs + _OLD_LOG_PROB_NOISE * torch.randn(log_probs.shape, generator=generator),
    )
    return _route(batch) if case.workload == "routed" else batch


def _route(batch: Batch) -> Batch:
    """Pad, route and silence sequences in exact shares, spread evenly over the lengths."""
    sequences, length = batch.mask.shape
    # Lengths rise evenly up to T, from as far below their mean as T is above it.
    shortest = 1 - 2 * PADDING
    lengths = torch.linspace(shortest, 1.0, sequences).mul(length).round()
    sdpo_mask = _spread(sequences, SDPO_SEQUENCES)
    policy = (~sdpo_mask).nonzero().squeeze(1)
    silent = policy[_spread(len(policy), ZERO_ADVANTAGE)]
    return replace(
        batch,
        mask=torch.arange(length) < lengths[:, None],
        sdpo_mask=sdpo_mask,
        advantages=batch.advantages.index_fill(0, silent, 0.0),
    )


def _spread(count: int, share: float) -> Tensor:
    """A bool ``[count]`` with ``round(share * count)`` true elements at even distances."""
    return (torch.arange(count + 1) * share).round().diff() > 0


@torch.no_grad()
def _log_probs(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
    blocks = [
        (rows @ weight.T).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        for rows, ids in zip(
            hidden.flatten(0, 1).split(_ROWS_PER_BLOCK),
            target_ids.flatten().split(_ROWS_PER_BLOCK),
            strict=True,
        )
    ]
    return torch.cat(blocks).view(target_ids.shape)
