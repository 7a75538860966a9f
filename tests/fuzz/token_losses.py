"""Losses of log-probs and normalizers, by the library and by the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

import srpo_kernels as sk
from reference import distillation, policy
from reference.layout import per_row
from reference.rollout import correct
from tests.comparison import Results
from tests.fuzz.case import Case
from tests.fuzz.models import Inputs


def _with_total(case: Case, loss: Tensor) -> Results:
    return {"total": (loss * case.upstream.to(loss)).sum()}


def library_policy(case: Case, inputs: Inputs) -> Results:
    out = sk.policy_loss(**inputs, config=case.config)
    return {name: value.to(out.loss.dtype) for name, value in out._asdict().items()} | _with_total(case, out.loss)


def oracle_policy(case: Case, inputs: Inputs) -> Results:
    config, rows = case.config, inputs["log_probs"]
    valid = torch.ones_like(rows, dtype=torch.bool) if inputs["mask"] is None else inputs["mask"]
    sequences = inputs["sequence_ids"]
    if sequences is None:
        sequences = torch.arange(len(rows))[:, None].expand_as(rows)
    log_probs, sequences = rows[valid], sequences[valid]
    advantages = per_row(inputs["advantages"], rows)[valid]
    old, ref, weights, entropy = (
        None if inputs[name] is None else inputs[name][valid]
        for name in ("old_log_probs", "ref_log_probs", "is_weights", "entropy")
    )
    loss = policy.policy_loss(log_probs, old, advantages, config, sequences)
    if config.rollout_correction is not None:
        everywhere = torch.ones_like(log_probs, dtype=torch.bool)
        loss = loss * correct(
            log_probs, old, inputs["rollout_log_probs"][valid], advantages, everywhere, everywhere, sequences,
            config.rollout_correction,
        )[0]  # fmt: skip
    loss = loss * (1.0 if weights is None else weights)
    ref_kl = (
        torch.zeros_like(loss)
        if ref is None
        else policy.kl_estimate(log_probs, ref, config.kl_type, config.log_ratio_clamp, old)
    )
    loss = loss + (config.kl_coef * ref_kl if config.kl_coef else 0.0)
    loss = loss - (0.0 if entropy is None else config.entropy_coef * entropy)
    approx_kl = policy.approx_kl(log_probs, log_probs if old is None else old, config.log_ratio_clamp)
    values = {"loss": loss, "approx_kl": approx_kl, "ref_kl": ref_kl}
    clips = policy.clip_masks(log_probs, old, advantages, config, sequences)
    values |= {name: mask.to(loss) for name, mask in clips.items()}
    spread = {name: rows.new_zeros(rows.shape).masked_scatter(valid, value) for name, value in values.items()}
    return spread | _with_total(case, spread["loss"])


def library_sampled(case: Case, inputs: Inputs) -> Results:
    loss = sk.sampled_distillation_loss(**inputs, config=case.config)
    return {"loss": loss} | _with_total(case, loss)


def oracle_sampled(case: Case, inputs: Inputs) -> Results:
    rows = inputs["log_probs"]
    valid = torch.ones_like(rows, dtype=torch.bool) if inputs["mask"] is None else inputs["mask"]
    old = None if inputs["old_log_probs"] is None else inputs["old_log_probs"][valid]
    kappa = distillation.importance_clip(rows[valid], old, case.config.distillation_is_clip)
    losses = kappa * distillation.sampled_loss(rows[valid], inputs["teacher_log_probs"][valid])
    if inputs["is_weights"] is not None:
        losses = losses * inputs["is_weights"][valid]
    loss = rows.new_zeros(rows.shape).masked_scatter(valid, losses)
    return {"loss": loss} | _with_total(case, loss)


def library_parts(case: Case, inputs: Inputs) -> Results:
    parts, beta = inputs["parts"], case.config.dw_beta
    first, *others = (
        sk.Normalizers.from_batch(inputs["mask"][i], inputs["sdpo_mask"][i], inputs["teacher_entropy"][i], beta)
        for i in ((parts == part).nonzero().flatten() for part in range(int(parts.max()) + 1))
    )
    return {name: value for name, value in first.merge(*others)._asdict().items() if value is not None}


def oracle_parts(case: Case, inputs: Inputs) -> Results:
    distilled = inputs["mask"] & per_row(inputs["sdpo_mask"], inputs["mask"])
    # It is exact in fp64, whatever the entropies' dtype.
    log_mean = distillation.weight_log_mean(inputs["teacher_entropy"][distilled].double(), case.config.dw_beta)
    return {
        "token_count": inputs["mask"].sum(),
        "dw_log_mean": log_mean if distilled.any() else torch.zeros_like(log_mean),
        "sdpo_count": distilled.sum(),
        "sequence_count": inputs["mask"].any(1).sum(),
    }
