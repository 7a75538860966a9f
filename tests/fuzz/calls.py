"""What a case computes, by the library and by the oracle, as tensors by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

import reference
import srpo_kernels as sk
from reference import distillation, policy
from reference.layout import per_row, teacher_rows
from reference.logits import head_logits, teacher_head
from reference.rollout import correct
from tests.comparison import Results
from tests.fuzz.case import Case
from tests.fuzz.models import Inputs
from tests.fuzz.routes import library_routing, oracle_routing
from tests.strategies import SHARED, transform_of

STATISTICS = ("log_probs", "entropy", "divergence")


class OracleNormalizers(NamedTuple):
    """What ``reference.srpo_loss`` reads of ``Normalizers``."""

    token_count: Tensor
    dw_log_mean: Tensor
    sequence_count: Tensor | None


def library(case: Case) -> Results:
    """The public function's results and gradients."""
    if case.keywords is None or case.keywords["backend"] != "triton":
        return _run(case, case.inputs, _LIBRARY[case.operation])
    from srpo_kernels.kernels import launch

    # A vocabulary of many blocks, or of a part of one.
    with patch.object(launch, "_ROW_LANES", case.lanes):
        return _run(case, case.inputs, _LIBRARY[case.operation])


def oracle(case: Case, inputs: Inputs, order: torch.Generator | None = None) -> Results:
    """The oracle's on ``inputs``; ``order`` shuffles what its sums run over: vocabulary and hidden dimensions."""
    return _run(case, inputs, _ORACLE[case.operation], order)


def _run(
    case: Case, inputs: Inputs, function: Callable[[Case, Inputs], Results], order: torch.Generator | None = None
) -> Results:
    """Values, and the gradients of the sum of ``total`` by the leaves that are there."""
    present = [name for name in case.leaves if inputs.get(name) is not None]
    inputs = inputs | {name: inputs[name].detach().clone().requires_grad_() for name in present}
    values = function(case, inputs if order is None or "weight" not in inputs else _shuffled(inputs, order))
    total = values.pop("total", None)
    results = {name: value.detach() for name, value in values.items()}
    if total is None or not present:
        return results
    gradients = torch.autograd.grad(total, [inputs[name] for name in present])
    return results | {f"grad {name}": grad for name, grad in zip(present, gradients, strict=True)}


def _shuffled(inputs: Inputs, order: torch.Generator) -> Inputs:
    """The same call with ids and hidden dimensions in another order, as views: gradients come back in the old one."""
    vocab_size, hidden_size = inputs["weight"].shape
    ids, columns = torch.randperm(vocab_size, generator=order), torch.randperm(hidden_size, generator=order)
    shuffled = {name: inputs[name][ids] for name in SHARED if inputs.get(name) is not None}
    shuffled |= {"hidden": inputs["hidden"][..., columns], "weight": shuffled["weight"][:, columns]}
    if inputs.get("teacher_hidden") is not None and inputs["teacher_weight"] is None:
        shuffled["teacher_hidden"] = inputs["teacher_hidden"][..., columns]
    if "target_ids" in inputs:
        targets = inputs["target_ids"]
        inside = (targets >= 0) & (targets < vocab_size)
        shuffled["target_ids"] = torch.where(inside, ids.argsort()[targets.clamp(0, vocab_size - 1)], targets)
    return inputs | shuffled


def _loss_values(case: Case, out: Any) -> Results:
    values = {"loss": out.loss, "log_probs": out.log_probs, "total": out.loss * case.upstream.item()}
    return values | {f"metric {name}": value for name, value in out.metrics.items()}


def _library_loss(case: Case, inputs: Inputs) -> Results:
    normalizers = None if case.other_batch is None else _library_normalizers(case, inputs)
    assert case.keywords is not None
    return _loss_values(case, sk.srpo_loss(**inputs, normalizers=normalizers, config=case.config, **case.keywords))


def _library_normalizers(case: Case, inputs: Inputs) -> sk.Normalizers:
    """This batch's, merged with the other batch's."""
    assert case.keywords is not None
    entropy, rows = None, inputs["target_ids"]
    if inputs["teacher_hidden"] is not None:
        head = teacher_head(*(inputs[name] for name in ("weight", "bias", "teacher_weight", "teacher_bias")))
        options = {"backend": case.keywords["backend"]} | transform_of(case.config)
        entropy = sk.teacher_stats(inputs["teacher_hidden"], head[0], teacher_bias=head[1], **options).entropy
    elif inputs.get("teacher_topk_log_probs") is not None:
        entropy = sk.topk_entropy(inputs["teacher_topk_log_probs"])
    mask = torch.ones_like(rows, dtype=torch.bool) if inputs["mask"] is None else inputs["mask"]
    own = sk.Normalizers.from_batch(mask, inputs["sdpo_mask"], entropy, case.config.dw_beta, inputs.get("sequence_ids"))
    return own.merge(_other_batch(case, own)) if case.other_batch is not None and case.other_batch[0] else own


def _other_batch(case: Case, own: sk.Normalizers) -> sk.Normalizers:
    assert case.other_batch is not None
    tokens, log_mean, distilled, sequences = case.other_batch
    sequence_count = None if own.sequence_count is None else torch.tensor(sequences)
    return sk.Normalizers(
        torch.tensor(tokens), own.dw_log_mean.new_tensor(log_mean), torch.tensor(distilled), sequence_count
    )


def _oracle_loss(case: Case, inputs: Inputs) -> Results:
    normalizers = None
    # With the normalizers of this very batch the loss is what it is without.
    if case.other_batch is not None and case.other_batch[0]:
        normalizers = _oracle_normalizers(case, inputs)
    return _loss_values(case, reference.srpo_loss(**inputs, normalizers=normalizers, config=case.config))


def _oracle_normalizers(case: Case, inputs: Inputs) -> OracleNormalizers:
    assert case.other_batch is not None
    tokens, log_mean, distilled, sequences = case.other_batch
    rows = inputs["target_ids"]
    valid = torch.ones_like(rows, dtype=torch.bool) if inputs["mask"] is None else inputs["mask"]
    routed = torch.zeros_like(valid) if inputs["sdpo_mask"] is None else per_row(inputs["sdpo_mask"], rows)
    log_sums, count = [inputs["hidden"].new_tensor(log_mean + math.log(distilled), dtype=torch.float64)], distilled
    if (valid & routed).any():
        if inputs["teacher_hidden"] is None:
            names = ("teacher_topk_log_probs", "teacher_topk_ids")
            entropy = distillation.bucket_entropy(
                *(teacher_rows(inputs[name], routed, valid & routed) for name in names)
            )
        else:
            head = teacher_head(*(inputs[name] for name in ("weight", "bias", "teacher_weight", "teacher_bias")))
            states = teacher_rows(inputs["teacher_hidden"], routed, valid & routed)
            entropy = reference.logits.entropy(head_logits(states, *head, **transform_of(case.config))).detach()
        log_sums.append(torch.logsumexp(-case.config.dw_beta * entropy.double(), 0))
        count += len(entropy)
    # How sequences are counted is checked by the cases whose normalizers are this very batch's.
    own = sk.Normalizers.from_batch(valid, None, None, 0.0, inputs.get("sequence_ids")).sequence_count
    log_sum = torch.logsumexp(torch.stack(log_sums), 0)
    return OracleNormalizers(valid.sum() + tokens, log_sum - math.log(count), None if own is None else own + sequences)


def _stats_values(case: Case, out: Any) -> Results:
    values = {name: value for name, value in out._asdict().items() if value is not None}
    differentiable = [values[name] for name in STATISTICS if name in values]
    upstream = case.upstream[: len(differentiable)]
    total = sum((value * c.to(value)).sum() for value, c in zip(differentiable, upstream, strict=True))
    return values | {"total": total}


def _stats_options(case: Case) -> dict[str, Any]:
    return transform_of(case.config) | {"divergence": case.config.divergence, "alpha": case.config.alpha}


def _library_stats(case: Case, inputs: Inputs) -> Results:
    assert case.keywords is not None
    return _stats_values(case, sk.token_stats(**inputs, **_stats_options(case), **case.keywords))


def _oracle_stats(case: Case, inputs: Inputs) -> Results:
    return _stats_values(case, reference.token_stats(**inputs, **_stats_options(case)))


def _library_teacher(case: Case, inputs: Inputs) -> Results:
    assert case.keywords is not None
    out = sk.teacher_stats(
        inputs["hidden"], inputs["weight"], mask=inputs["mask"], teacher_bias=inputs["bias"],
        **transform_of(case.config), **case.keywords,
    )  # fmt: skip
    return out._asdict()


def _oracle_teacher(case: Case, inputs: Inputs) -> Results:
    transform = transform_of(case.config)
    rows = inputs["hidden"].shape[:-1]
    valid = torch.ones(rows, dtype=torch.bool) if inputs["mask"] is None else inputs["mask"]
    logits = head_logits(inputs["hidden"][valid], inputs["weight"], inputs["bias"], **transform)
    spread = logits.new_zeros(rows)
    values = {"entropy": reference.logits.entropy(logits), "logsumexp": logits.logsumexp(-1)}
    return {name: spread.masked_scatter(valid, value) for name, value in values.items()}


def _with_total(case: Case, loss: Tensor) -> Results:
    return {"total": (loss * case.upstream.to(loss)).sum()}


def _library_policy(case: Case, inputs: Inputs) -> Results:
    out = sk.policy_loss(**inputs, config=case.config)
    return {name: value.to(out.loss.dtype) for name, value in out._asdict().items()} | _with_total(case, out.loss)


def _oracle_policy(case: Case, inputs: Inputs) -> Results:
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


def _library_sampled(case: Case, inputs: Inputs) -> Results:
    loss = sk.sampled_distillation_loss(**inputs, config=case.config)
    return {"loss": loss} | _with_total(case, loss)


def _oracle_sampled(case: Case, inputs: Inputs) -> Results:
    rows = inputs["log_probs"]
    valid = torch.ones_like(rows, dtype=torch.bool) if inputs["mask"] is None else inputs["mask"]
    old = None if inputs["old_log_probs"] is None else inputs["old_log_probs"][valid]
    kappa = distillation.importance_clip(rows[valid], old, case.config.distillation_is_clip)
    losses = kappa * distillation.sampled_loss(rows[valid], inputs["teacher_log_probs"][valid])
    if inputs["is_weights"] is not None:
        losses = losses * inputs["is_weights"][valid]
    loss = rows.new_zeros(rows.shape).masked_scatter(valid, losses)
    return {"loss": loss} | _with_total(case, loss)


def _library_parts(case: Case, inputs: Inputs) -> Results:
    parts, beta = inputs["parts"], case.config.dw_beta
    first, *others = (
        sk.Normalizers.from_batch(inputs["mask"][i], inputs["sdpo_mask"][i], inputs["teacher_entropy"][i], beta)
        for i in ((parts == part).nonzero().flatten() for part in range(int(parts.max()) + 1))
    )
    return {name: value for name, value in first.merge(*others)._asdict().items() if value is not None}


def _oracle_parts(case: Case, inputs: Inputs) -> Results:
    distilled = inputs["mask"] & per_row(inputs["sdpo_mask"], inputs["mask"])
    # It is exact in fp64, whatever the entropies' dtype.
    log_mean = distillation.weight_log_mean(inputs["teacher_entropy"][distilled].double(), case.config.dw_beta)
    return {
        "token_count": inputs["mask"].sum(),
        "dw_log_mean": log_mean if distilled.any() else torch.zeros_like(log_mean),
        "sdpo_count": distilled.sum(),
        "sequence_count": inputs["mask"].any(1).sum(),
    }


_LIBRARY = {
    "srpo_loss": _library_loss,
    "token_stats": _library_stats,
    "teacher_stats": _library_teacher,
    "policy_loss": _library_policy,
    "sampled_distillation_loss": _library_sampled,
    "normalizers": _library_parts,
    "routing": library_routing,
}
_ORACLE = {
    "srpo_loss": _oracle_loss,
    "token_stats": _oracle_stats,
    "teacher_stats": _oracle_teacher,
    "policy_loss": _oracle_policy,
    "sampled_distillation_loss": _oracle_sampled,
    "normalizers": _oracle_parts,
    "routing": oracle_routing,
}
