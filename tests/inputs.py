"""Tensor arguments of the library's functions by seed, in fp64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import reference
from srpo_kernels import Normalizers, SRPOConfig
from srpo_kernels.engine.backends import rows_of
from srpo_kernels.engine.memory import RowMemory

LEAVES = ("hidden", "weight", "bias")
SHARED = ("weight", "bias", "teacher_weight", "teacher_bias")
MODEL_TENSORS = ("hidden", "teacher_hidden", *SHARED)

Inputs = dict[str, Any]


def transform_of(config: SRPOConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("temperature", "logit_scale", "softcap")}


def teacher_transform_of(config: SRPOConfig) -> dict[str, Any]:
    """The teacher's own, or the student's."""
    return transform_of(config) if config.teacher_transform is None else config.teacher_transform._asdict()


def head_inputs(
    seed: int,
    rows: tuple[int, ...],
    hidden_size: int,
    vocab_size: int,
    teacher_size: int | None = None,
    spread: float = 1.0,
) -> Inputs:
    """Student and teacher in fp64, with logits of standard deviation ``spread``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    width = hidden_size if teacher_size is None else teacher_size
    return {
        "hidden": normal(*rows, hidden_size) * spread / math.sqrt(hidden_size),
        "weight": normal(vocab_size, hidden_size),
        "target_ids": torch.randint(0, vocab_size, rows, generator=generator),
        "bias": normal(vocab_size),
        "mask": torch.rand(rows, generator=generator) < 0.8,
        "teacher_hidden": normal(*rows, width) * spread / math.sqrt(width),
        "teacher_weight": None if teacher_size is None else normal(vocab_size, width),
        "teacher_bias": None if teacher_size is None else normal(vocab_size),
    }


def loss_inputs(
    seed: int = 0,
    rows: tuple[int, ...] = (4, 6),
    hidden_size: int = 8,
    vocab_size: int = 33,
    teacher_size: int | None = None,
    spread: float = 1.0,
    config: SRPOConfig | None = None,
) -> Inputs:
    """Every tensor argument of ``srpo_loss`` in fp64, old and reference log-probs near the student's.

    Packed rows ``[N]`` get unsorted, interleaved sequence ids; routes and advantages are per first dimension.
    """
    inputs = head_inputs(seed, rows, hidden_size, vocab_size, teacher_size, spread)
    student = {name: inputs[name] for name in ("hidden", "weight", "target_ids", "bias")}
    transform = transform_of(SRPOConfig() if config is None else config)
    log_probs = reference.token_stats(**student, **transform).log_probs
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if len(rows) == 1:
        names = torch.tensor([7, -3, 2**40, 0, 11])
        inputs["sequence_ids"] = names[torch.randint(0, len(names), rows, generator=generator)]
    return (
        inputs
        | {
            "advantages": normal(rows[0]) * (torch.rand(rows[0], generator=generator) < 0.7),
            "sdpo_mask": torch.rand(rows[0], generator=generator) < 0.5,
            "old_log_probs": log_probs + 0.4 * normal(*rows),
            "ref_log_probs": log_probs + 0.4 * normal(*rows),
            "is_weights": 2 * torch.rand(rows, generator=generator, dtype=torch.float64),
        }
        | rollout_inputs(config, log_probs, generator)
    )


def rollout_inputs(config: SRPOConfig | None, log_probs: Tensor, generator: torch.Generator) -> Inputs:
    """What a rollout correction takes: the rollout engine's log-probs, some of them not known."""
    if config is None or config.rollout_correction is None:
        return {}
    noise = torch.randn(log_probs.shape, generator=generator, dtype=torch.float64)
    unknown = torch.rand(log_probs.shape, generator=generator) < 0.1
    return {"rollout_log_probs": (log_probs + 0.3 * noise).masked_fill(unknown, math.nan)}


def take(inputs: Inputs, index: Tensor) -> Inputs:
    """Some entries of the first dimension, in the order of ``index``."""
    return {name: x if x is None or name in SHARED else x[index] for name, x in inputs.items()}


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The model's tensors in ``dtype``, what the caller says of each row in fp32 or, for fp64, in fp64."""
    row_dtype = torch.promote_types(dtype, torch.float32)

    def convert(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [convert(name, x) for x in value]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.to(dtype if name in MODEL_TENSORS else row_dtype)

    return {name: convert(name, value) for name, value in inputs.items()}


def for_backend(inputs: Inputs, backend: str) -> Inputs:
    """The inputs in the widest dtype that the backend computes in."""
    return cast(inputs, torch.float32) if backend == "triton" else inputs


def with_given_topk(inputs: Inputs, config: SRPOConfig, k: int, *, fewer: bool = True) -> Inputs:
    """The teacher's likeliest tokens in place of its hidden states, ``fewer`` of them in some rows."""
    own = inputs["teacher_weight"] is not None
    head = [inputs[name] for name in (("teacher_weight", "teacher_bias") if own else ("weight", "bias"))]
    logits = reference.logits.head_logits(inputs["teacher_hidden"], *head, **teacher_transform_of(config))
    log_probs, ids = logits.log_softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
    if fewer:
        absent = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.1
        # Of a row's whole mass nothing can be missing: among tokens without any, no distribution is the teacher's.
        absent &= log_probs.masked_fill(absent, -math.inf).logsumexp(-1, keepdim=True) > -100.0
        ids, log_probs = ids.masked_fill(absent, -1), log_probs.masked_fill(absent, -math.inf)
    given = {"teacher_topk_ids": ids, "teacher_topk_log_probs": log_probs}
    return inputs | dict.fromkeys(("teacher_hidden", "teacher_weight", "teacher_bias")) | given


def random_support(target_ids: Tensor, vocab_size: int, k: int, seed: int = 0) -> Tensor:
    """Distinct ids of each row, fewer in some; most have the row's own."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(*target_ids.shape, vocab_size, generator=generator)
    scores.scatter_(-1, target_ids[..., None], 0.8)
    ids = scores.topk(min(k, vocab_size), dim=-1).indices
    return ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.1, -1)


def larger_batch(inputs: Inputs, config: SRPOConfig) -> Normalizers:
    """Normalizers of a batch that has more than these rows, and teachers that are a little less certain."""
    own_head = inputs["teacher_weight"] is not None
    teacher = {
        "hidden": inputs["teacher_hidden"],
        "weight": inputs["teacher_weight" if own_head else "weight"],
        "bias": inputs["teacher_bias" if own_head else "bias"],
    }
    transform = teacher_transform_of(config)
    entropy = reference.token_stats(**teacher, target_ids=inputs["target_ids"], **transform).entropy
    log_mean = reference.distillation.weight_log_mean(entropy.flatten(), config.dw_beta) - 0.1 * config.dw_beta
    return Normalizers(torch.tensor(40), log_mean, torch.tensor(35), torch.tensor(18))


def policy_rows(inputs: Inputs) -> Tensor:
    """The valid rows of the policy branch, in the shape of ``target_ids``."""
    mask, routed = inputs["mask"], inputs["sdpo_mask"]
    valid = torch.ones_like(inputs["target_ids"], dtype=torch.bool) if mask is None else mask
    if routed is None:
        return valid
    return valid & ~(routed if routed.shape == valid.shape else routed[:, None])


def workspace_floor(vocab_size: int, itemsize: int, models: int, backend: str = "torch") -> int:
    """Bytes of the smallest workspace that a backend accepts on a CPU."""
    cpu = torch.device("cpu")
    return RowMemory(vocab_size, itemsize, rows_of(backend).scratch(vocab_size, cpu), cpu).floor(models)
