"""prime-rl's losses: sums over one packed sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import srpo_kernels as sk
from tools.peers.batches import Batch, Comparison, Function, token_losses
from tools.peers.sources import functions_of


def comparisons(checkout: Path) -> list[Comparison]:
    """Its default without the penalty, whose value is another; and ipo."""
    names = ("_safe_mean", "compute_importance_ratio_and_mismatch_kl", "default_loss_fn", "ipo_loss_fn")
    found = functions_of(checkout / "src/prime_rl/trainer/rl/loss.py", names, torch=torch, LossOutputs=SimpleNamespace)
    bounds = SimpleNamespace(dppo_mask_low=0.1, dppo_mask_high=0.15, adv_tau=1.0, kl_tau=0.0)
    ipo = SimpleNamespace(ipo_threshold=0.05, adv_tau=1.0, kl_tau=1e-3)
    return [
        Comparison(
            "prime-rl", "default_loss_fn, kl_tau=0", "dppo_tv", _theirs(found.default_loss_fn, bounds),
            _ours(loss_type="dppo_tv", epsilon_low=0.1, epsilon_high=0.15, loss_options={"ratio_max": 1e6}),
            values=False,
        ),
        Comparison(
            "prime-rl", "ipo_loss_fn", "ipo", _theirs(found.ipo_loss_fn, ipo),
            _ours(loss_type="ipo", loss_options={"threshold": 0.05, "penalty": 1e-3}),
        ),
    ]  # fmt: skip


def _theirs(function: Callable[..., Any], config: SimpleNamespace) -> Function:
    def loss(batch: Batch, log_probs: Tensor) -> Tensor:
        inputs = SimpleNamespace(
            trainer_logprobs=log_probs.flatten(),
            inference_logprobs=batch.old_log_probs.flatten(),
            advantages=batch.advantages[:, None].expand_as(log_probs).flatten(),
            loss_mask=batch.mask.flatten(),
            loss_weights=None,
        )
        result: Tensor = function(inputs, config).loss
        return result

    return loss


def _ours(**options: Any) -> Function:
    return lambda batch, log_probs: token_losses(sk.SRPOConfig(**options), batch, log_probs).sum()
