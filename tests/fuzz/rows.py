"""What a case has of each row: how many there are, which are valid, and log-probs of other policies."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from srpo_kernels import SRPOConfig
from tests.fuzz.case import Draw
from tests.fuzz.models import Inputs

SEQUENCE_NAMES = torch.tensor([7, -3, 2**40, 0, 11])
# exp of more nats than this is beyond fp64: the oracle could not say what is right.
_MOST_NATS = 600.0


def draw_rows(draw: Draw, backend: str) -> tuple[int, ...]:
    """The shape of the targets."""
    most = 10 if backend == "triton" else 20
    if draw.one_of("packed", False, True):
        return (draw.random.randint(1, most),)
    sequences = draw.random.randint(1, 4)
    return (sequences, draw.random.randint(1, max(1, most // sequences)))


def draw_mask(draw: Draw, rows: tuple[int, ...]) -> Tensor | None:
    """The valid rows."""
    kind = draw.one_of("mask", None, 0.8, 0.8, 0.8, 0.3, 0.0)
    if kind is None:
        return None
    mask = draw.uniform(*rows) < kind
    if len(rows) == 2 and draw.one_of("empty_sequence", False, False, True):
        mask[0] = False
    return mask


def rollout_rows(draw: Draw, config: SRPOConfig, log_probs: Tensor, dtype: torch.dtype) -> Inputs:
    """The rollout engine's log-probs, some of them not known, for a correction that takes them."""
    if config.rollout_correction is None:
        return {}
    gap = draw.one_of("rollout_gap", 0.3, 0.3, 0.3, 3.0, 100.0)
    unknown = draw.uniform(*log_probs.shape) < 0.1
    return {
        "rollout_log_probs": (log_probs + gap * draw.normal(*log_probs.shape)).masked_fill(unknown, math.nan).to(dtype)
    }


def distant(draw: Draw, name: str, log_probs: Tensor, unbounded: bool, dtype: torch.dtype) -> Tensor | None:
    """Log-probs at a distance from these, above or below; away from where a clip of a ratio would begin."""
    gap = draw.one_of(f"{name}_gap", None, 0.0, 0.4, 0.4, 1.0, 30.0, 100.0, 1000.0)
    if gap is None:
        return None
    gap = min(gap, _MOST_NATS) if unbounded else gap
    signs = torch.where(draw.uniform(*log_probs.shape) < 0.5, -1.0, 1.0)
    away = signs * gap + (0.05 if gap else 0.0) * draw.normal(*log_probs.shape)
    if not gap and draw.options["loss_type"] == "kl_cov":
        # Its gradient jumps where a ratio is 1.
        away = away + 0.01
    return (log_probs + away).to(dtype)


def poisoned(draw: Draw, inputs: Inputs) -> Inputs:
    """Masked rows that would spoil everything if they were read."""
    masked, bad = ~inputs["mask"], draw.one_of("poison_value", math.nan, math.inf)
    spoilt: Inputs = {"target_ids": inputs["target_ids"].masked_fill(masked, draw.random.choice([-100, 2**40]))}
    for name in (
        "hidden",
        "teacher_hidden",
        "old_log_probs",
        "ref_log_probs",
        "rollout_log_probs",
        "is_weights",
        "advantages",
    ):
        value = inputs.get(name)
        if value is not None and value.shape[: masked.ndim] == masked.shape:
            spoilt[name] = value.clone()
            spoilt[name][masked] = bad
    return spoilt
