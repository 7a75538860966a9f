"""GRPO and its relatives as Liger-Kernel and TRL name them, by ``srpo_loss`` and by ``policy_loss``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import srpo_kernels as sk
from tools.peers.suites.losses import BACKEND, token_stats
from tools.peers.suites.suite import no_counterpart

_REDUCTIONS = {"grpo": "sequence", "sapo": "sequence", "dr_grpo": "constant", "luspo": "sequence"}


def capped(rows: sk.PolicyRows, *, ratio_max: float = 5.0) -> sk.TokenLoss:
    """Their cispo: one bound, from above, of any size."""
    ratio = rows.log_ratio.detach().exp()
    loss = -ratio.clamp(max=ratio_max) * rows.advantages * rows.log_probs
    return sk.TokenLoss(loss, None, (ratio > ratio_max) & (rows.advantages > 0))


sk.register_policy_loss("capped", capped, zero_without_advantage=True)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Their options, by their names."""

    loss_type: str
    beta: float
    epsilon_low: float
    epsilon_high: float
    importance_sampling_level: str = "token"
    temperature: float = 1.0
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    delta: float | None = None
    use_bias_correction_kl: bool = False
    vespo: tuple[float, float, float, float] = (2.0, 3.0, 3.0, 2.0)
    max_completion_length: int | None = None

    def __post_init__(self) -> None:
        """Refuse what they refuse."""
        if self.importance_sampling_level == "sequence" and self.loss_type in ("cispo", "sapo", "vespo"):
            raise ValueError(f"Sequence-level importance sampling is not supported for {self.loss_type!r}")

    def config(self, *, per_token: bool = False, kl_factor: float = 1.0) -> sk.SRPOConfig:
        """Ours, with its reduction or for token losses."""
        by_sequence = self.importance_sampling_level == "sequence"
        if by_sequence and self.use_bias_correction_kl and self.beta:
            no_counterpart("a KL term weighted by the sequence's ratio: k3_weighted takes the token's")
        name, options = "gspo" if by_sequence else "grpo", {}
        others: dict[str, Any] = {"delta": self.delta}
        if self.loss_type == "luspo" and by_sequence and not per_token:
            name = "luspo"
        if self.loss_type == "cispo":
            name, options, others = "capped", {"ratio_max": self.epsilon_high}, {}
        if self.loss_type == "sapo":
            name, others = "sapo", {}
            options = {"tau_positive": self.sapo_temperature_pos, "tau_negative": self.sapo_temperature_neg}
        if self.loss_type == "vespo":
            names = ("k_positive", "lambda_positive", "k_negative", "lambda_negative")
            name, options, others = "vespo", dict(zip(names, self.vespo, strict=True)), {}
        return sk.SRPOConfig(
            loss_type=name, loss_options=options, epsilon_low=self.epsilon_low, epsilon_high=self.epsilon_high,
            log_ratio_clamp=20.0 if name == "vespo" else None, kl_coef=self.beta * kl_factor,
            kl_type="k3_weighted" if self.use_bias_correction_kl else "k3", temperature=self.temperature,
            reduction="token" if per_token else _REDUCTIONS.get(self.loss_type, "token"),  # type: ignore[arg-type]
            max_length=self.max_completion_length if self.loss_type == "dr_grpo" and not per_token else None,
            **others,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What both calls take; ``mask`` is bool, the log-probs ``[B, T]`` or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ids: Tensor
    mask: Tensor
    advantages: Tensor
    old_log_probs: Tensor | None
    ref_log_probs: Tensor | None
    is_weights: Tensor | None

    def check(self, options: Options) -> None:
        """What has no counterpart whatever the reduction."""
        if options.loss_type == "vespo" and self.is_weights is not None:
            no_counterpart("vespo with the engine's correction in its log-ratio: here it multiplies the loss")


def reduced(batch: Batch, options: Options, num_items: Any = None) -> tuple[Tensor, list[Tensor]]:
    """The loss, and their metrics: the mean KL where there is one, and the share of clipped tokens."""
    batch.check(options)
    factor = 1.0
    if options.loss_type == "luspo" and options.beta:
        if not batch.mask.all():
            no_counterpart("luspo's KL term at masked tokens, which it counts")
        factor = float(batch.mask.shape[1])
    count = batch.mask.sum()
    normalizers = None
    if num_items is not None and _REDUCTIONS.get(options.loss_type) is None:
        normalizers = sk.Normalizers(torch.as_tensor(num_items), torch.zeros(()))
    out = sk.srpo_loss(
        batch.hidden, batch.weight, batch.ids, bias=batch.bias, advantages=batch.advantages, mask=batch.mask,
        old_log_probs=batch.old_log_probs, ref_log_probs=batch.ref_log_probs, is_weights=batch.is_weights,
        normalizers=normalizers, config=options.config(kl_factor=factor), backend=BACKEND,
    )  # fmt: skip
    clipped = out.metrics["clip_low_count"] + out.metrics["clip_high_count"]
    return out.loss, [*([out.metrics["ref_kl_sum"] / count] if options.beta else []), clipped / count]


def per_token(batch: Batch, options: Options) -> sk.PolicyTerms:
    """The token losses, from log-probs; 0 where masked."""
    batch.check(options)
    stats = token_stats(
        batch.hidden, batch.weight, batch.ids, bias=batch.bias, mask=batch.mask, temperature=options.temperature
    )
    weights = batch.is_weights
    if weights is not None:
        weights = (weights if weights.dim() == 2 else weights[:, None]).expand(batch.ids.shape)
    return sk.policy_loss(
        stats.log_probs, batch.advantages, mask=batch.mask, old_log_probs=batch.old_log_probs,
        ref_log_probs=batch.ref_log_probs, is_weights=weights, config=options.config(per_token=True),
    )  # fmt: skip
