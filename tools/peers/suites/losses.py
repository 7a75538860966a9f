"""What the peers' losses have in common, by this library's public functions."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

import srpo_kernels as sk
from tools.peers.suites.suite import no_counterpart

BACKEND = os.environ.get("SRPO_PEER_BACKEND", "torch")


def head_of(logits: Tensor) -> Tensor:
    """The LM head that makes logits of themselves: for functions that take logits."""
    return torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)


def token_stats(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> sk.TokenStats:
    """``sk.token_stats`` on the backend of this run."""
    return sk.token_stats(hidden, weight, targets, backend=BACKEND, **options)


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    class_weights: Tensor | None = None,
    ignore_index: int = -100,
    z_coefficient: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    by_probability: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cross entropy plus ``z_coefficient * logsumexp**2``, and the latter alone.

    ``by_probability``: times the target's probability, detached.
    ``"mean"`` and ``"sum"`` are ``fused_loss``, unless the second value is asked for; ``"none"`` is ``token_stats``.
    """
    mask = targets != ignore_index
    targets = targets.masked_fill(~mask, 0)
    factors = torch.ones_like(targets, dtype=torch.float32) if class_weights is None else class_weights[targets].float()
    total = (factors * mask).sum() if reduction == "mean" else torch.ones(())
    count = mask.sum().clamp_min(1) if reduction == "mean" else 1
    factors = factors / total

    def objective(rows: sk.ObjectiveRows) -> Tensor:
        likely = rows.log_probs.detach().exp() if by_probability else 1.0
        return -rows.factors * likely * rows.log_probs

    if reduction != "none" and not z_coefficient:
        out = sk.fused_loss(
            hidden, weight, targets, objective, inputs={"factors": factors},
            mask=mask, bias=bias, config=sk.SRPOConfig(softcap=softcap), backend=BACKEND,
        )  # fmt: skip
        return out.loss, torch.zeros_like(out.loss)
    stats = token_stats(hidden, weight, targets, mask=mask, bias=bias, softcap=softcap)
    z_losses = z_coefficient * stats.logsumexp.square() / count
    if by_probability:
        factors = factors * stats.log_probs.detach().exp()
    losses = z_losses - factors * stats.log_probs
    if reduction == "none":
        return losses, z_losses
    return losses.sum(), z_losses.sum()


def divergence_config(beta: float, temperature: float) -> sk.SRPOConfig:
    """Their generalised JSD: ``beta`` of 0 and 1 are the two KLs."""
    name = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(float(beta), "jsd")
    return sk.SRPOConfig(divergence=name, alpha=float(beta), temperature=float(temperature))  # type: ignore[arg-type]


def shifted(hidden: Tensor, targets: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Each position beside the target ``shift`` places on."""
    return (hidden[..., : targets.shape[-1] - shift, :], targets[..., shift:]) if shift else (hidden, targets)


def refuse(reason: str, *asked: object) -> None:
    """No counterpart where anything of ``asked`` is."""
    if any(value is not None and bool(value) for value in asked):
        no_counterpart(reason)
