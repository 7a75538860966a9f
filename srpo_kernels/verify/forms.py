"""Edits of a case's inputs: numbers that each row has of its own."""

from __future__ import annotations

import math

import torch

from srpo_kernels.verify.inputs import Inputs


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
