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
from reference import distillation
from reference.layout import per_row, teacher_rows
from reference.logits import head_logits, teacher_head
from tests.comparison import Results
from tests.fuzz.case import Case
from tests.fuzz.models import Inputs
from tests.fuzz.routes import library_routing, oracle_routing
from tests.fuzz.token_losses import (
    library_parts,
    library_policy,
    library_sampled,
    oracle_parts,
    oracle_policy,
    oracle_sampled,
)
from tests.inputs import SHARED, teacher_transform_of, transform_of
from tests.parity import oracle_options

STATISTICS = ("log_probs", "entropy", "divergence", "logsumexp")
# What the objective of ``fused_loss`` reads besides.
FULL = ("log_probs", "entropy")


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
    for name in ("target_ids", "support_ids", "teacher_topk_ids"):
        tokens = inputs.get(name)
        if tokens is not None:
            inside = (tokens >= 0) & (tokens < vocab_size)
            shuffled[name] = torch.where(inside, ids.argsort()[tokens.clamp(0, vocab_size - 1)], tokens)
    return inputs | shuffled


def _loss_values(case: Case, out: Any) -> Results:
    values = {"loss": out.loss, "log_probs": out.log_probs, "total": out.loss * case.upstream.item()}
    return values | {f"metric {name}": value for name, value in out.metrics.items()}


def _library_loss(case: Case, inputs: Inputs) -> Results:
    normalizers = None if case.other_batch is None else _library_normalizers(case, inputs)
    assert case.keywords is not None
    keywords = dict(case.keywords)
    if keywords.get("teacher_head_ids") is not None:
        # The one head three times.
        heads = {name: [inputs[name]] * 3 for name in ("teacher_weight", "teacher_bias")}
        if inputs["teacher_weight"] is None:
            heads["teacher_bias"] = None
        inputs = inputs | heads
    return _loss_values(case, sk.srpo_loss(**inputs, normalizers=normalizers, config=case.config, **keywords))


def _library_normalizers(case: Case, inputs: Inputs) -> sk.Normalizers:
    """This batch's, merged with the other batch's."""
    assert case.keywords is not None
    entropy, rows = None, inputs["target_ids"]
    if inputs["teacher_hidden"] is not None:
        head = teacher_head(*(inputs[name] for name in ("weight", "bias", "teacher_weight", "teacher_bias")))
        options = {"backend": case.keywords["backend"]} | teacher_transform_of(case.config)
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
            entropy = reference.logits.entropy(head_logits(states, *head, **teacher_transform_of(case.config))).detach()
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


def _library_stats(case: Case, inputs: Inputs) -> Results:
    assert case.keywords is not None
    return _stats_values(case, sk.token_stats(**inputs, config=case.config, **case.keywords))


def _oracle_stats(case: Case, inputs: Inputs) -> Results:
    return _stats_values(case, reference.token_stats(**oracle_options({"config": case.config}) | inputs))


def _library_fused(case: Case, inputs: Inputs) -> Results:
    assert case.keywords is not None
    taught, has_teacher = _teacher_mask(case, inputs)
    names = [name for name in STATISTICS if has_teacher or name != "divergence"] + [f"full_{name}" for name in FULL]
    # A gradient that is 0 everywhere is still one.
    weights = {f"by_{name}": c.to(case.dtype) for name, c in zip(names, case.upstream, strict=False)}

    def objective(rows: sk.ObjectiveRows) -> Tensor:
        terms = [getattr(rows, f"by_{name}") * getattr(rows, name) for name in names]
        return torch.stack(terms).sum(0)

    out = sk.fused_loss(
        **inputs, objective=objective, inputs=weights, teacher_mask=taught, config=case.config, **case.keywords
    )
    return {"losses": out.losses, "log_probs": out.log_probs, "total": out.loss}


def _oracle_fused(case: Case, inputs: Inputs) -> Results:
    taught, has_teacher = _teacher_mask(case, inputs)
    options = oracle_options({"config": case.config})
    own = reference.token_stats(**options | inputs)
    full = reference.token_stats(**options | inputs | {"support_ids": None})
    values = {name: getattr(own, name) for name in STATISTICS if has_teacher or name != "divergence"}
    if taught is not None:
        values["divergence"] = values["divergence"] * taught
    values |= {f"full_{name}": getattr(full, name) for name in FULL}
    terms = [x * c.to(x) for x, c in zip(values.values(), case.upstream, strict=False)]
    losses = torch.stack(terms).sum(0)
    return {"losses": losses, "log_probs": own.log_probs, "total": losses.sum()}


def _teacher_mask(case: Case, inputs: Inputs) -> tuple[Tensor | None, bool]:
    """The rows that have a teacher, None for all, and whether there is one."""
    share, targets = case.options["teacher_mask"], inputs["target_ids"]
    has_teacher = inputs.get("teacher_hidden") is not None or inputs.get("teacher_topk_ids") is not None
    if share is None or not has_teacher:
        return None, has_teacher
    chance = torch.rand(targets.shape, generator=torch.Generator().manual_seed(case.seed))
    return chance < share, True


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


_LIBRARY = {
    "srpo_loss": _library_loss,
    "token_stats": _library_stats,
    "fused_loss": _library_fused,
    "teacher_stats": _library_teacher,
    "policy_loss": library_policy,
    "sampled_distillation_loss": library_sampled,
    "normalizers": library_parts,
    "routing": library_routing,
}
_ORACLE = {
    "srpo_loss": _oracle_loss,
    "token_stats": _oracle_stats,
    "fused_loss": _oracle_fused,
    "teacher_stats": _oracle_teacher,
    "policy_loss": oracle_policy,
    "sampled_distillation_loss": oracle_sampled,
    "normalizers": oracle_parts,
    "routing": oracle_routing,
}
