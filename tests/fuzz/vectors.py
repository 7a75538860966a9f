"""Cases of the functions that see no model: losses of log-probs, normalizers, routing."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from srpo_kernels import SRPOConfig
from tests.fuzz.case import Case, Draw
from tests.fuzz.models import Inputs, to_dtypes
from tests.fuzz.options import draw_config
from tests.fuzz.rows import SEQUENCE_NAMES, distant, draw_mask, draw_rows, rollout_rows


def token_loss_case(draw: Draw, seed: int, backend: str) -> Case:
    operation, config, rows = draw.options["operation"], draw_config(draw), draw_rows(draw, "torch")
    if operation == "sampled_distillation_loss":
        config = replace(config, rollout_correction=None)
    dtype = draw.one_of("dtype", torch.float32, torch.float64)
    log_probs = -draw.normal(*rows).abs() * draw.one_of("log_probs", 1.0, 1e-4, 30.0, 1000.0)
    inputs: Inputs = {
        "log_probs": log_probs,
        "old_log_probs": distant(draw, "old_log_probs", log_probs, config.log_ratio_clamp is None, dtype),
        "is_weights": 2 * draw.uniform(*rows) if draw.one_of("is_weights", False, True) else None,
    }
    if operation == "policy_loss":
        inputs |= rollout_rows(draw, config, log_probs, dtype)
        if config.rollout_correction is not None and inputs["old_log_probs"] is None:
            inputs["old_log_probs"] = log_probs - 0.2
        inputs |= {
            "advantages": draw.normal(*(rows if draw.one_of("advantages", "[B]", "[B, T]") != "[B]" else rows[:1])),
            "ref_log_probs": distant(draw, "ref_log_probs", log_probs, "k3" in config.kl_type, dtype),
            "entropy": draw.normal(*rows).abs() if config.entropy_coef else None,
            "sequence_ids": SEQUENCE_NAMES[draw.ids(len(SEQUENCE_NAMES), *rows)] if len(rows) == 1 else None,
        }
        if inputs["ref_log_probs"] is None and config.kl_coef != 0:
            inputs["ref_log_probs"] = log_probs + 0.3
    else:
        inputs["teacher_log_probs"] = distant(draw, "teacher_log_probs", log_probs, False, dtype)
        if inputs["teacher_log_probs"] is None:
            inputs["teacher_log_probs"] = log_probs - 0.3
    inputs = to_dtypes(inputs, dict.fromkeys(inputs, dtype)) | {"mask": draw_mask(draw, rows)}
    if inputs["mask"] is not None and draw.one_of("poison", False, True):
        masked = ~inputs["mask"]
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape == masked.shape:
                inputs[name] = value.masked_fill(masked, math.nan)
    return Case(seed, operation, draw.options, inputs, config, ("log_probs", "entropy"), draw.normal(*rows))


def normalizers_case(draw: Draw, seed: int, backend: str) -> Case:
    """``parts`` of a batch, whose normalizers are merged."""
    config, rows = draw_config(draw), (draw.random.randint(1, 8), draw.random.randint(1, 6))
    entropy = draw.uniform(*rows) * draw.one_of("entropy", 1.0, 12.0, 1e-4)
    routed = rows if draw.one_of("sdpo_mask", "[B]", "[B, T]") == "[B, T]" else rows[:1]
    inputs: Inputs = {
        "mask": draw.uniform(*rows) < draw.one_of("mask", 0.8, 0.2, 0.0),
        "sdpo_mask": draw.uniform(*routed) < draw.one_of("routed", 0.5, 1.0, 0.0),
        "teacher_entropy": entropy.to(draw.one_of("dtype", torch.float32, torch.float64, torch.bfloat16)),
        "parts": draw.ids(draw.one_of("num_parts", 1, 2, 4), rows[0]),
    }
    return Case(seed, "normalizers", draw.options, inputs, config)


def routing_case(draw: Draw, seed: int, backend: str) -> Case:
    count = draw.random.randint(1, 12)
    rewards = {
        "binary": draw.ids(2, count).double(),
        "levels": draw.ids(4, count) / 3,
        "normal": draw.normal(count),
        "equal": torch.full((count,), 0.2, dtype=torch.float64),
    }[draw.one_of("rewards", "binary", "levels", "normal", "equal")]
    inputs: Inputs = {
        "rewards": (rewards * draw.one_of("reward_scale", 1.0, 1e-6, 1e6)).to(
            draw.one_of("dtype", torch.float32, torch.float64, torch.bfloat16)
        ),
        "group_ids": SEQUENCE_NAMES[draw.ids(3, count)],
        "feedback_available": draw.uniform(count) < 0.3 if draw.one_of("feedback", False, True) else None,
    }
    draw.one_of("scale", "none", "group", "batch")
    draw.one_of("success_threshold", 0.5, 0.0, 1.0)
    return Case(seed, "routing", draw.options, inputs, SRPOConfig())
