"""The combined objective. Paper 3.3."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import distillation, policy, rollout
from .layout import head_ids, per_row, reduction_factors, resolve_sequence_ids, teacher_rows
from .logits import (
    Project,
    entropy,
    head_logits,
    project_wide,
    restricted,
    select_heads,
    token_log_probs,
    working_dtype,
)
from .logits import teacher_logits as of_teacher


class SRPOOutput(NamedTuple):
    """``loss`` scalar; detached: ``metrics``, sums and counts, and ``log_probs`` in ``target_ids``' shape."""

    loss: Tensor
    metrics: dict[str, Tensor]
    log_probs: Tensor


class Branch(NamedTuple):
    """Token losses with gradient, detached log-probs of the same rows, and this branch's metrics."""

    losses: Tensor
    log_probs: Tensor
    metrics: dict[str, Tensor]


def active_policy_rows(policy_rows: Tensor, advantages: Tensor, sequence_ids: Tensor, config: Any) -> Tensor:
    """The policy rows that can move a weight: ``A != 0``, or all where a KL or entropy term is on.

    In ``gspo`` a token moves its whole sequence's ratio, so one nonzero advantage makes the sequence active.
    """
    if config.kl_coef != 0 or config.entropy_coef != 0 or config.loss_type in policy.ALWAYS_ACTIVE_LOSSES:
        return policy_rows
    moving = policy_rows & (advantages != 0)
    correction = getattr(config, "rollout_correction", None)
    off_policy = correction is not None and correction.off_policy_threshold is not None
    if config.loss_type in policy.SEQUENCE_LOSSES or off_policy:
        return policy_rows & (policy.sequence_sum(moving.long(), sequence_ids) > 0)
    return moving


def policy_branch(
    logits: Tensor,
    target_ids: Tensor,
    advantages: Tensor,
    old_log_probs: Tensor | None,
    ref_log_probs: Tensor | None,
    is_weights: Tensor | None,
    sequence_ids: Tensor,
    config: Any,
) -> Branch:
    """``l_t = is_t · policy loss + kl_coef · KL(ref) - entropy_coef · H(p)`` on the active policy rows."""
    log_probs = token_log_probs(logits, target_ids)
    losses = policy.policy_loss(log_probs, old_log_probs, advantages, config, sequence_ids)
    clips = policy.clip_masks(log_probs, old_log_probs, advantages, config, sequence_ids)
    metrics = {f"{name}_count": mask.sum() for name, mask in clips.items()}
    if is_weights is not None:
        losses = losses * is_weights
    if config.kl_coef != 0:
        if ref_log_probs is None:
            raise ValueError(f"ref_log_probs: {config.kl_coef=} needs them, got None")
        losses = losses + config.kl_coef * policy.kl_estimate(
            log_probs, ref_log_probs, config.kl_type, config.log_ratio_clamp, old_log_probs
        )
    if config.entropy_coef != 0 or config.count_entropy:
        entropies = entropy(logits)
        losses = losses - config.entropy_coef * entropies
        metrics |= {"entropy_sum": entropies.sum(), "entropy_tokens": torch.tensor(len(entropies))}
    return Branch(losses, log_probs.detach(), metrics | {"policy_loss_sum": losses.sum()})


def distillation_branch(
    logits: Tensor,
    teacher_logits: Tensor | None,
    topk: tuple[Tensor, Tensor] | None,
    target_ids: Tensor,
    old_log_probs: Tensor | None,
    is_weights: Tensor | None,
    alpha: Tensor | None,
    clip: Tensor | None,
    normalizers: Any,
    config: Any,
) -> Branch:
    """``w_t · kappa_t · is_t · D_t`` on the valid distillation rows.

    ``topk`` are ids and log-probs of the teacher's likeliest tokens, in place of its logits.
    """
    log_probs = token_log_probs(logits, target_ids)
    if topk is not None:
        ids, teacher_log_probs = topk
        teacher_entropy = distillation.bucket_entropy(teacher_log_probs, ids)
        token_losses, divergences = distillation.given_distillation_loss(
            logits, ids, teacher_log_probs, config, alpha, clip
        )
    elif teacher_logits is not None:
        teacher_entropy = entropy(teacher_logits)
        token_losses, divergences = distillation.distillation_loss(
            logits, teacher_logits, target_ids, config, alpha, clip
        )
    else:
        raise ValueError("teacher_hidden: distillation rows need it, got None")
    if normalizers is None:
        log_mean = distillation.weight_log_mean(teacher_entropy, config.dw_beta)
    else:
        log_mean = normalizers.dw_log_mean
    weights = distillation.entropy_weights(teacher_entropy, config.dw_beta, log_mean)
    kappa = distillation.importance_clip(log_probs, old_log_probs, config.distillation_is_clip)
    losses = weights * kappa * token_losses
    if is_weights is not None:
        losses = losses * is_weights
    metrics = {
        "sdpo_loss_sum": losses.sum(),
        "teacher_entropy_sum": teacher_entropy.sum(),
        "dw_weight_sum": weights.sum(),
        "dw_weight_sq_sum": (weights**2).sum(),
        "divergence_sum": divergences.sum(),
    }
    return Branch(losses, log_probs.detach(), metrics)


def nonfinite_rows(losses: Tensor, logits: Tensor) -> Tensor:
    """How many rows have a loss, or where one is wanted a gradient, that is not finite."""
    finite = losses.isfinite()
    if losses.requires_grad:
        (grad,) = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
        finite = finite & grad.isfinite().all(1)
    return (~finite).sum()


def srpo_loss(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    advantages: Tensor | None = None,
    mask: Tensor | None = None,
    sdpo_mask: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | list[Tensor | None] | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | list[Tensor | None] | None = None,
    teacher_head_ids: Tensor | None = None,
    teacher_topk_ids: Tensor | None = None,
    teacher_topk_log_probs: Tensor | None = None,
    divergence_alpha: Tensor | None = None,
    divergence_clip: Tensor | None = None,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    is_weights: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    support_ids: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    normalizers: Any = None,
    config: Any,
    project: Project = project_wide,
) -> SRPOOutput:
    """The SRPO loss ``Σ_policy f_t l_t + Σ_sdpo f_t w_t kappa_t is_t D_t``, ``f_t`` the reduction. Paper 3.3.

    ``hidden`` is ``[B, T, H]`` or packed ``[N, H]``, ``weight`` ``[V, H]``, ``target_ids`` ``[B, T]`` or
    ``[N]``. Gradient reaches ``hidden``, ``weight`` and ``bias``. ``config`` needs the attributes of
    ``SRPOConfig``, ``normalizers`` ``token_count``, ``dw_log_mean`` and ``sequence_count``. Each branch
    selects its rows before any arithmetic, so inf or NaN in a masked row changes nothing. ``project`` is the matmul
    of ``head_logits``.
    """
    dtype = working_dtype(hidden)
    logits_of = partial(
        head_logits,
        temperature=config.temperature,
        logit_scale=config.logit_scale,
        softcap=config.softcap,
        project=project,
    )

    teacher_logits_of = partial(
        of_teacher,
        teacher_transform=getattr(config, "teacher_transform", None),
        temperature=config.temperature,
        logit_scale=config.logit_scale,
        softcap=config.softcap,
        project=project,
    )

    def policy_logits_of(rows: Tensor) -> Tensor:
        logits = logits_of(hidden[rows], weight, bias)
        return logits if support_ids is None else restricted(logits, support_ids[rows], target_ids[rows])

    def select(value: Tensor | None, rows: Tensor) -> Tensor | None:
        return None if value is None else per_row(value.detach(), target_ids)[rows].to(dtype)

    valid = torch.ones_like(target_ids, dtype=torch.bool) if mask is None else mask
    routed = torch.zeros_like(valid) if sdpo_mask is None else per_row(sdpo_mask, target_ids)
    advantages = torch.zeros_like(target_ids) if advantages is None else per_row(advantages, target_ids)
    sequence_ids = resolve_sequence_ids(sequence_ids, target_ids, config)
    policy_rows, sdpo_rows = valid & ~routed, valid & routed
    active = active_policy_rows(policy_rows, advantages, sequence_ids, config)

    correction = getattr(config, "rollout_correction", None)
    weights, clipped = torch.ones_like(target_ids, dtype=dtype), torch.zeros_like(valid)
    if correction is not None:
        current = torch.zeros(target_ids.shape, dtype=dtype, device=hidden.device)
        current[policy_rows] = token_log_probs(policy_logits_of(policy_rows), target_ids[policy_rows]).detach()
        current[sdpo_rows] = token_log_probs(logits_of(hidden[sdpo_rows], weight, bias), target_ids[sdpo_rows]).detach()
        if rollout_log_probs is None:
            raise ValueError("rollout_log_probs: config.rollout_correction needs them, got None")
        weights, clipped = rollout.correct(
            current, old_log_probs, rollout_log_probs, advantages, valid, active, sequence_ids, correction
        )
        is_weights = weights if is_weights is None else torch.where(valid, per_row(is_weights, target_ids) * weights, 0)

    policy_logits = policy_logits_of(active)
    policy_part = policy_branch(
        policy_logits,
        target_ids[active],
        advantages.detach()[active].to(dtype),
        select(old_log_probs, active),
        select(ref_log_probs, active),
        select(is_weights, active),
        sequence_ids[active],
        config,
    )

    student_logits = logits_of(hidden[sdpo_rows], weight, bias)
    # Without distillation rows there may be no teacher: both models' logits are ``[0, V]``.
    teacher_logits, topk = None if sdpo_rows.any() else student_logits.detach(), None
    if teacher_topk_ids is not None and teacher_topk_log_probs is not None:
        ids = teacher_rows(teacher_topk_ids, routed, sdpo_rows)
        topk = ids, teacher_rows(teacher_topk_log_probs, routed, sdpo_rows).detach().to(dtype)
    elif teacher_hidden is not None and sdpo_rows.any():
        states = teacher_rows(teacher_hidden, routed, sdpo_rows)
        named = None if teacher_head_ids is None else head_ids(teacher_head_ids, routed, sdpo_rows)
        teacher_logits = torch.empty(len(states), len(weight), dtype=working_dtype(states), device=states.device)
        for rows, own_weight, own_bias in select_heads(states, teacher_weight, teacher_bias, named, (weight, bias)):
            teacher_logits[rows] = teacher_logits_of(states[rows], own_weight, own_bias)
    sdpo_part = distillation_branch(
        student_logits,
        teacher_logits,
        topk,
        target_ids[sdpo_rows],
        select(old_log_probs, sdpo_rows),
        select(is_weights, sdpo_rows),
        select(divergence_alpha, sdpo_rows),
        select(divergence_clip, sdpo_rows),
        normalizers,
        config,
    )

    factors = reduction_factors(valid, sequence_ids, normalizers, config, dtype)
    loss = (factors[active] * policy_part.losses).sum() + (factors[sdpo_rows] * sdpo_part.losses).sum()

    scored = policy_rows if config.count_inactive else active
    idle = scored & ~active
    log_probs = torch.zeros(target_ids.shape, dtype=dtype, device=hidden.device)
    log_probs[active] = policy_part.log_probs
    log_probs[sdpo_rows] = sdpo_part.log_probs
    log_probs[idle] = token_log_probs(policy_logits_of(idle), target_ids[idle]).detach()

    if config.count_entropy and idle.any():
        idle_entropy = entropy(policy_logits_of(idle)).detach()
        policy_part.metrics["entropy_sum"] = policy_part.metrics["entropy_sum"] + idle_entropy.sum()
        policy_part.metrics["entropy_tokens"] = policy_part.metrics["entropy_tokens"] + len(idle_entropy)

    zero = torch.zeros((), dtype=dtype, device=hidden.device)
    old, ref = select(old_log_probs, scored), select(ref_log_probs, scored)
    approx_kl = zero if old is None else policy.approx_kl(log_probs[scored], old, config.log_ratio_clamp)
    ref_kl = zero
    if ref is not None:
        ref_kl = policy.kl_estimate(log_probs[scored], ref, config.kl_type, config.log_ratio_clamp, old)
    nonfinite = [nonfinite_rows(policy_part.losses, policy_logits), nonfinite_rows(sdpo_part.losses, student_logits)]
    metrics = {
        "policy_tokens": policy_rows.sum(),
        "sdpo_tokens": sdpo_rows.sum(),
        "active_rows": active.sum() + sdpo_rows.sum(),
        "scored_policy_tokens": scored.sum(),
        "ref_kl_sum": ref_kl.sum(),
        "approx_kl_sum": approx_kl.sum(),
        "entropy_sum": zero,
        "entropy_tokens": zero,
        "nonfinite_rows": torch.stack(nonfinite).sum(),
    }
    metrics |= policy_part.metrics | sdpo_part.metrics
    counted = scored | sdpo_rows if correction is not None else torch.zeros_like(valid)
    metrics |= rollout.sums(weights[counted], clipped[counted])
    return SRPOOutput(loss, {name: value.detach().to(zero) for name, value in metrics.items()}, log_probs)
