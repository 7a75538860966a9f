"""verl's policy losses, KL penalties and rollout corrections."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import torch
from torch import Tensor

import srpo_kernels as sk
from tools.peers.batches import Batch, Comparison, Function, sequence_mean, token_losses, token_mean
from tools.peers.sources import functions_of

_BOUND = 20.0
# Their name, ours with its options, and how theirs is reduced.
_LOSSES: tuple[tuple[str, str, dict[str, float], Callable[[Tensor, Tensor], Tensor]], ...] = (
    ("vanilla", "grpo", {}, token_mean),
    ("dppo_tv", "dppo_tv", {"ratio_max": 3.0}, token_mean),
    ("dppo_kl", "dppo_kl", {"ratio_max": 3.0}, token_mean),
    ("gspo", "gspo_token", {}, sequence_mean),
    ("sapo", "sapo", {"tau_positive": 1.3, "tau_negative": 0.7}, sequence_mean),
    ("gpg", "reinforce", {}, token_mean),
    # All tokens of the band: which of them are taken is chance there.
    ("clip_cov", "clip_cov", {"share": 1.0, "cov_low": 0.1, "cov_high": 2.0}, token_mean),
    ("kl_cov", "kl_cov", {"share": 0.2, "coefficient": 0.5}, token_mean),
    ("geo_mean", "gmpo", {}, sequence_mean),
    ("dro", "dro", {"beta": 0.3}, token_mean),
    ("cispo", "cispo", {}, token_mean),
)
_PENALTIES = {"k1": "k1", "k2": "k2", "low_var_kl": "k3_bounded", "k1+": "k1+"}
_MASKS = ("token_k1", "token_k2", "token_k3", "seq_sum_k1", "seq_mean_k1", "seq_mean_k3", "seq_max_k2", "seq_max_k3")


class _ActorConfig(SimpleNamespace):
    def get(self, name: str, default: object) -> object:
        return getattr(self, name, default)


def comparisons(checkout: Path) -> list[Comparison]:
    """Every policy loss that has a name here, and what is computed around it."""
    folder = checkout / "verl/trainer/ppo"
    masked = functions_of(checkout / "verl/utils/torch_functional.py", ("masked_sum", "masked_mean"), torch=torch)
    around = {
        "torch": torch, "math": math, "Any": Any, "Optional": Optional, "verl_F": masked, "ActorConfig": _ActorConfig,
        "AlgoConfig": type(None), "SAFETY_BOUND": _BOUND,
    }  # fmt: skip
    names = [f"compute_policy_loss_{name}" for name, *_ in _LOSSES]
    losses = functions_of(folder / "core_algos.py", [*names, "agg_loss", "kl_penalty", "kl_penalty_forward"], **around)
    return [
        *(_loss(getattr(losses, f"compute_policy_loss_{line[0]}"), *line) for line in _LOSSES),
        *(_penalty(losses.kl_penalty, *pair) for pair in _PENALTIES.items()),
        *_corrections(folder / "rollout_corr_helper.py", around),
    ]


def _loss(
    function: Callable[..., Any], theirs: str, ours: str, options: dict[str, float],
    reduce: Callable[[Tensor, Tensor], Tensor],
) -> Comparison:  # fmt: skip
    dual_clip = 3.0 if ours == "grpo" else None
    config = sk.SRPOConfig(
        loss_type=ours, loss_options=options, epsilon_low=0.1, epsilon_high=0.15, dual_clip=dual_clip
    )  # fmt: skip
    actor = _ActorConfig(
        clip_ratio=0.1, clip_ratio_low=0.1, clip_ratio_high=0.15, clip_ratio_c=3.0, global_batch_info={},
        tau_pos=options.get("tau_positive"), tau_neg=options.get("tau_negative"),
        policy_loss=SimpleNamespace(
            clip_cov_ratio=options.get("share"), clip_cov_lb=options.get("cov_low"),
            clip_cov_ub=options.get("cov_high"), kl_cov_ratio=options.get("share"),
            ppo_kl_coef=options.get("coefficient"), dro_beta=options.get("beta"),
        ),
    )  # fmt: skip

    def their_loss(batch: Batch, log_probs: Tensor) -> Tensor:
        loss: Tensor = function(
            batch.old_log_probs,
            log_probs,
            batch.advantages[:, None].expand_as(log_probs),
            batch.mask.float(),
            config=actor,
        )[0]
        return loss

    def our_loss(batch: Batch, log_probs: Tensor) -> Tensor:
        return reduce(token_losses(config, batch, log_probs), batch.mask)

    return Comparison("verl", theirs, ours, their_loss, our_loss)


def _penalty(function: Callable[..., Tensor], theirs: str, ours: str) -> Comparison:
    def our_penalty(batch: Batch, log_probs: Tensor) -> Tensor:
        config = sk.SRPOConfig(kl_coef=1.0, kl_type=ours)  # type: ignore[arg-type]
        nothing = torch.zeros(len(log_probs))
        return sk.policy_loss(log_probs, nothing, ref_log_probs=batch.other_log_probs, config=config).loss

    def their_penalty(batch: Batch, log_probs: Tensor) -> Tensor:
        return function(log_probs, batch.other_log_probs, theirs)

    return Comparison("verl", f"kl_penalty={theirs}", ours, their_penalty, our_penalty)


def _corrections(helper: Path, around: dict[str, Any]) -> list[Comparison]:
    names = (
        "compute_rollout_correction_weights", "compute_rollout_rejection_mask", "_parse_rollout_rs_thresholds",
        "_parse_rollout_is_threshold",
    )  # fmt: skip
    constants = {"SUPPORTED_ROLLOUT_RS_OPTIONS": set(_MASKS), "TOKEN_LEVEL_ROLLOUT_RS_OPTIONS": set(_MASKS[:3])}
    nothing: dict[str, Any] = {"compute_is_metrics": lambda **_: {}, "compute_rs_metrics": lambda **_: {}}
    found = functions_of(helper, names, **around, **constants, **nothing)

    def theirs(function: Callable[..., Any], **options: float | str) -> Function:
        def values(batch: Batch, log_probs: Tensor) -> Tensor:
            log_ratio = batch.old_log_probs - batch.other_log_probs
            result: Tensor = function(log_ratio=log_ratio, response_mask=batch.mask.float(), **options)[0]
            return result.float()

        return values

    def weights(level: str, bound: float | str) -> Function:
        return theirs(found.compute_rollout_correction_weights, rollout_is=level, rollout_is_threshold=bound)

    def kept(name: str, bound: str) -> Function:
        return theirs(found.compute_rollout_rejection_mask, rollout_rs=name, rollout_rs_threshold=bound)

    def ours(correction: sk.RolloutCorrection) -> Function:
        config = sk.SRPOConfig(loss_type="reinforce", rollout_correction=correction)

        def weights_of(batch: Batch, log_probs: Tensor) -> Tensor:
            ones = torch.ones_like(batch.advantages)
            return sk.policy_loss(
                -torch.ones_like(log_probs), ones, mask=batch.mask, old_log_probs=batch.old_log_probs,
                rollout_log_probs=batch.other_log_probs, config=config,
            ).loss  # fmt: skip

        return weights_of

    levels = [
        Comparison(
            "verl", f"rollout_is={level}", f"tis(level={level!r})", weights(level, 1.5),
            ours(sk.RolloutCorrection.tis(1.5, level=level)), gradients=False,
        )
        for level in ("token", "sequence")
    ]  # fmt: skip
    icepop = Comparison(
        "verl", "rollout_is_threshold=0.8_1.5", "icepop", weights("token", "0.8_1.5"),
        ours(sk.RolloutCorrection.icepop(0.8, 1.5)), gradients=False,
    )  # fmt: skip
    masks = []
    for name in _MASKS:
        # Their band of k1 is one of ratios the other way round.
        by_k1 = name.endswith("k1")
        bound, band = ("0.5_1.5", (-math.log(1.5), -math.log(0.5))) if by_k1 else ("0.2", (None, 0.2))
        correction = sk.RolloutCorrection(level=None, masks={name: band})
        masks.append(
            Comparison(
                "verl", f"rollout_rs={name}", f"masks={name}", kept(name, bound), ours(correction), gradients=False
            )
        )
    return [*levels, icepop, *masks]
