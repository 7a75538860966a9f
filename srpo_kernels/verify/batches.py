"""The batches that are measured."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

import srpo_kernels as sk
from srpo_kernels.verify.kinds import (
    ACTIVE_OF_VALID,
    DEFAULT_ACTIVE,
    HEADS,
    SDPO_SEQUENCES,
    ZERO_ADVANTAGE,
    DtypeName,
    HeadName,
    OwnWorkload,
    Workload,
)
from srpo_kernels_reference.logits import softcapped, token_log_probs

DTYPES: dict[DtypeName, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_ALPHAS: dict[str, float] = {"forward_kl": 0.0, "reverse_kl": 1.0}
# Those without a teacher.
_OF_POLICY = ("policy", "ratio_mask", "support")
_SEQUENCES = 32
_TEACHERS_TOPK = 100
_SUPPORT = 64
_LOGIT_STD = 2.5
_TEACHER_NOISE = 0.5
_OLD_LOG_PROB_NOISE = 0.2
# Few enough that preparing a batch needs less memory than any provider does.
_ROWS_PER_BLOCK = 32


@dataclass(frozen=True)
class Case:
    """One head under one kind of batch: all policy rows, all distillation rows of one divergence, or a routed mix.

    ``active`` is the share of a routed batch's rows that can move a weight; ``vocab_size`` of None is the head's own.
    """

    head: HeadName
    workload: Workload | OwnWorkload
    rows: int
    dtype: DtypeName = "float32"
    softcap: float | None = None
    active: float = DEFAULT_ACTIVE
    vocab_size: int | None = None

    @property
    def hidden_size(self) -> int:
        return HEADS[self.head].hidden_size

    @property
    def vocabulary(self) -> int:
        return HEADS[self.head].vocab_size if self.vocab_size is None else self.vocab_size

    @property
    def config(self) -> sk.SRPOConfig:
        options = {"distillation_mode": "topk", "topk_of": "teacher"} if self.workload == "topk_teacher" else {}
        return sk.SRPOConfig.from_alpha(_ALPHAS.get(self.workload, 0.5), softcap=self.softcap, **options)

    @property
    def labels(self) -> dict[str, object]:
        """What names it in a file."""
        softcap = "" if self.softcap is None else self.softcap
        own = {"hidden_size": self.hidden_size, "vocab_size": self.vocabulary, "softcap": softcap}
        return asdict(self) | own

    @property
    def name(self) -> str:
        parts: list[str] = [self.head, self.workload, self.dtype]
        if self.workload == "routed":
            parts.append(f"{self.active:.0%} active")
        if self.softcap is not None:
            parts.append(f"softcap {self.softcap:g}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Batch:
    """``B`` sequences of ``T`` response positions; ``hidden`` and ``weight`` are leaves.

    ``distills`` says whether any sequence is routed to distillation: it is no tensor, for the compilers' sake.
    ``topk_ids`` and ``topk_log_probs`` are a teacher's in place of ``teacher_hidden``, ``support_ids`` what the rows
    were sampled from.
    """

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    target_ids: Tensor
    mask: Tensor
    sdpo_mask: Tensor
    advantages: Tensor
    old_log_probs: Tensor
    distills: bool
    config: sk.SRPOConfig
    workload: Workload | OwnWorkload = "routed"
    topk_ids: Tensor | None = None
    topk_log_probs: Tensor | None = None
    support_ids: Tensor | None = None

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

    def unweighted(self) -> Batch:
        """The same batch under the plain sum of divergences, without entropy-aware or importance weights."""
        return replace(self, config=replace(self.config, dw_beta=0.0, distillation_is_clip=None))


def make_batch(case: Case, device: torch.device | None = None, seed: int = 0) -> Batch:
    """A random batch whose logits, teacher and old log-probs are about as far apart as a training step's."""
    if case.rows <= 0 or case.rows % _SEQUENCES:
        raise ValueError(f"rows must be a positive multiple of {_SEQUENCES} sequences, got {case.rows}")
    # On the device: a large head takes a CPU seconds.
    where = device or torch.device("cpu")
    generator = torch.Generator(where).manual_seed(seed)
    dtype = DTYPES[case.dtype]
    sequences, length = _SEQUENCES, case.rows // _SEQUENCES

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=where)

    hidden = normal(sequences, length, case.hidden_size)
    teacher_hidden = hidden + _TEACHER_NOISE * normal(*hidden.shape)
    weight = normal(case.vocabulary, case.hidden_size).mul_(_LOGIT_STD / math.sqrt(case.hidden_size))
    target_ids = torch.randint(case.vocabulary, (sequences, length), generator=generator, device=where)
    noise = _OLD_LOG_PROB_NOISE * normal(sequences, length)
    advantages = normal(sequences)
    hidden, teacher_hidden, weight = (x.to(dtype) for x in (hidden, teacher_hidden, weight))
    batch = Batch(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        teacher_hidden=teacher_hidden,
        target_ids=target_ids,
        mask=torch.ones_like(target_ids, dtype=torch.bool),
        sdpo_mask=torch.full((sequences,), case.workload not in (*_OF_POLICY, "routed"), device=where),
        advantages=advantages,
        old_log_probs=_log_probs(hidden, weight, target_ids, case.softcap) + noise,
        distills=case.workload not in _OF_POLICY,
        config=case.config,
        workload=case.workload,
    )
    match case.workload:
        case "routed":
            return _route(batch, case.active)
        case "topk_teacher":
            ids, log_probs = _likeliest(teacher_hidden, weight, _TEACHERS_TOPK)
            return replace(batch, topk_ids=ids, topk_log_probs=log_probs)
        case "support":
            return replace(batch, support_ids=_likeliest(hidden, weight, _SUPPORT)[0])
        case _:
            return batch


def _route(batch: Batch, active: float) -> Batch:
    """Pad, route and silence sequences in exact shares, spread evenly over the lengths."""
    sequences, length = batch.mask.shape
    if not 0 < active <= ACTIVE_OF_VALID:
        raise ValueError(f"active must lie in (0, {ACTIVE_OF_VALID:g}] for a routed batch, got {active}")
    # Lengths rise evenly, from as far below their mean as T, or twice the mean, is above it.
    mean = active / ACTIVE_OF_VALID
    spread = min(mean, 1 - mean)
    lengths = torch.linspace(mean - spread, mean + spread, sequences).mul(length).round()
    sdpo_mask = _spread(sequences, SDPO_SEQUENCES)
    policy = (~sdpo_mask).nonzero().squeeze(1)
    silent = policy[_spread(len(policy), ZERO_ADVANTAGE)]
    device = batch.mask.device
    return replace(
        batch,
        mask=(torch.arange(length) < lengths[:, None]).to(device),
        sdpo_mask=sdpo_mask.to(device),
        advantages=batch.advantages.index_fill(0, silent.to(device), 0.0),
    )


def _spread(count: int, share: float) -> Tensor:
    """A bool ``[count]`` with ``round(share * count)`` true elements at even distances."""
    return (torch.arange(count + 1) * share).round().diff() > 0


@torch.no_grad()
def _likeliest(hidden: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids and log-probs ``[B, T, k]``."""
    found = [(rows @ weight.T).float().log_softmax(-1).topk(k) for rows in hidden.flatten(0, 1).split(_ROWS_PER_BLOCK)]
    shape = (*hidden.shape[:-1], k)
    return torch.cat([x.indices for x in found]).view(shape), torch.cat([x.values for x in found]).view(shape)


@torch.no_grad()
def _log_probs(hidden: Tensor, weight: Tensor, target_ids: Tensor, softcap: float | None) -> Tensor:
    blocks = []
    for rows, ids in zip(
        hidden.flatten(0, 1).split(_ROWS_PER_BLOCK), target_ids.flatten().split(_ROWS_PER_BLOCK), strict=True
    ):
        blocks.append(token_log_probs(softcapped((rows @ weight.T).float(), softcap), ids))
    return torch.cat(blocks).view(target_ids.shape)
