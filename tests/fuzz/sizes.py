"""How large the numbers are that a case's results are made of: what each of their roundings is relative to."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from reference.logits import LOWEST, transform
from reference.policy import LARGEST_LOG_RATIO
from srpo_kernels import SRPOConfig
from srpo_kernels.rows.mixture import has_mixture, mixture_of
from tests.comparison import Results, largest
from tests.fuzz.case import Case
from tests.inputs import teacher_transform_of, transform_of


def finite(x: Tensor) -> Tensor:
    """Its finite elements."""
    return x[x.isfinite()]


def probability_size(case: Case, name: str, exact: Results) -> float:
    """How large probabilities are in a quantity: they are rounded at their size, however little is beside them."""
    if case.operation == "normalizers":
        # The difference of two logarithms of counts.
        return math.log(1.0 + case.inputs["mask"].numel())
    if "weight" not in case.inputs:
        return 0.0
    config = case.config
    coefficient, of_statistics = float(case.upstream.abs().sum()), case.operation != "srpo_loss"
    sampled = case.operation in ("token_stats", "fused_loss") and config.distillation_mode == "sampled"
    product = _log_prob_product(case, exact) if sampled else 1.0
    if name == "log_probs" or (of_statistics and not name.startswith("grad")):
        # What multiplies the log-ratio of an entry is a probability, which is rounded as its logit is.
        entries = _bounded_entries(case) * max(1.0, largest(finite(exact[name])))
        if name == "divergence":
            # The probabilities of each model add up to 1, rounded, and so do the shares of a row's own mixture.
            shares = 2.0 if case.inputs.get("divergence_alpha") is not None else 0.0
            return (max(2.0, 2 * _concentration(case)) + entries + shares) * product
        size = _concentration(case) + _capped_size(case)
        return coefficient * product * (max(2.0, 2 * size) + entries) if name == "losses" else size
    coefficient *= product
    if case.operation == "srpo_loss":
        coefficient = _largest_coefficient(case, config, exact)
        if not name.startswith("grad"):
            coefficient *= 1.0 + _bounded_entries(case)
    if name.startswith("metric"):
        rows = case.inputs["target_ids"].numel()
        # A sum of log-probs, each rounded at its own size.
        return max(coefficient, 1.0) * rows + math.sqrt(rows) * largest(finite(exact["log_probs"]))
    if not name.startswith("grad"):
        # A sum of rows, of which no mean is taken, has the roundings of all.
        return coefficient * (case.inputs["target_ids"].numel() if config.reduction.endswith("_sum") else 1.0)
    if case.operation == "srpo_loss":
        coefficient *= abs(case.upstream.item())
    elif case.inputs.get("teacher_hidden") is not None or case.inputs.get("teacher_topk_ids") is not None:
        # A divergence's gradient has both models' probabilities in it.
        coefficient *= 2
    if has_mixture(config.divergence):
        # The log-ratio to the mixture, at most, less its mean.
        coefficient *= 1.0 - math.log(mixture_of(config.divergence, config.alpha).student_share)
    elif bounded(case) and (case.keywords or {}).get("backend") == "triton":
        # The same of a KL whose entries are bounded: its kernel subtracts the mean of log-ratios, not logit by logit.
        coefficient *= 1.0 + 2.0 * _nats(case)
    slope = config.logit_scale / config.temperature
    weight, hidden = (finite(case.inputs[x].double()) for x in ("weight", "hidden"))
    size = {"grad hidden": largest(weight), "grad weight": largest(hidden), "grad bias": 1.0}[name]
    # A log-sum-exp is rounded like a logit, in fp64 whatever the dtype: there is nothing wider to keep it in.
    narrower = torch.finfo(torch.float64).eps / torch.finfo(case.dtype).eps
    size *= 1.0 + slope * largest_logit(case, "") * narrower
    return coefficient * slope * size


def _bounded_entries(case: Case) -> float:
    """Entries of a divergence that are bounded one by one are of log-probs, in fp64 rounded at the size of a logit."""
    return _nats(case) if bounded(case) and case.dtype == torch.float64 else 0.0


def bounded(case: Case) -> bool:
    """Whether a divergence's entries are."""
    return case.config.divergence_clip is not None or case.inputs.get("divergence_clip") is not None


def weight_growth(case: Case, name: str) -> float:
    """How much the roundings of two entropies, at the size of log V, grow in the weight: exp of their difference.

    In its square twice as much.
    """
    if case.operation != "srpo_loss" or name == "log_probs":
        return 0.0
    return (
        (4 if name == "metric dw_weight_sq_sum" else 2)
        * case.config.dw_beta
        * (1.0 + math.log(len(case.inputs["weight"])))
    )


def _capped_size(case: Case) -> float:
    """How large a softcap's logits are: they are rounded at their size, where it is flat too."""
    config = case.config
    if config.softcap is None:
        return 0.0
    return min(config.softcap, config.logit_scale * largest_logit(case, "")) / config.temperature


def _nats(case: Case) -> float:
    """The largest logit of both models, after the transform."""
    models = [""] if case.inputs.get("teacher_hidden") is None else ["", "teacher_"]
    slope = case.config.logit_scale / case.config.temperature
    return slope * max(largest_logit(case, model) for model in models)


def _concentration(case: Case) -> float:
    """The root of a row's sum of squared probabilities, at most 1: their roundings are independent."""
    if case.dtype == torch.float64:
        # The oracle's probabilities come from log-probs, rounded at the size of log V.
        return 1.0 + math.log(len(case.inputs["weight"]))
    models = (
        ["", "teacher_"]
        if case.operation in ("token_stats", "fused_loss") and case.inputs.get("teacher_hidden") is not None
        else [""]
    )
    transforms = {"": transform_of(case.config), "teacher_": teacher_transform_of(case.config)}
    logits = [transform(_logits(case, model), **transforms[model]) for model in models]
    return max((float(x.softmax(-1).square().sum(-1).sqrt().max()) for x in logits if len(x)), default=0.0)


def largest_logit(case: Case, model: str) -> float:
    """Of the valid rows of a model, before the transform; those that are banned do not count."""
    logits = _logits(case, model)
    return largest(finite(logits[logits > LOWEST]))


def _logits(case: Case, model: str) -> Tensor:
    """``[n, V]`` of the valid rows before the transform, in fp64."""
    inputs = case.inputs
    own = model if inputs.get("teacher_weight") is not None else ""
    valid = inputs["mask"]
    hidden = inputs[f"{model}hidden"]
    # A teacher may have the routed rows alone.
    everywhere = valid is None or valid.shape != hidden.shape[:-1]
    rows = (hidden.flatten(0, -2) if everywhere else hidden[valid]).double()
    bias = inputs[f"{own}bias"]
    return rows @ inputs[f"{own}weight"].double().T + (0.0 if bias is None else bias.double())


def _largest_coefficient(case: Case, config: SRPOConfig, exact: dict[str, Any]) -> float:
    """The most that a row's log-prob is multiplied with on its way to the loss, as far as it is plain to see."""
    valid = case.inputs["mask"]

    def most(name: str) -> float:
        value = case.inputs[name]
        if value is None or (valid is not None and not valid.any()):
            return 1.0
        known = value[valid] if valid is not None and value.shape == valid.shape else value
        return largest(finite(known.double()))

    weight = float(exact["metric dw_weight_sq_sum"].sqrt())
    kappa = config.distillation_is_clip if case.inputs["old_log_probs"] is not None else 1.0
    distilled = weight * (kappa or 1.0) if weight else 0.0
    if config.distillation_mode == "sampled":
        distilled *= _log_prob_product(case, exact)
    penalty = config.kl_coef * _steepest_kl(case, exact) + abs(config.entropy_coef)
    ratio = 1.0
    if len(case.inputs["weight"]) == 1 and case.inputs["old_log_probs"] is not None:
        # The gradient is 0, whatever the ratio that multiplies its roundings.
        ratio = math.exp(min(_gaps(exact, case.inputs["old_log_probs"]), config.log_ratio_clamp or LARGEST_LOG_RATIO))
    weights = max(most("is_weights"), 1.0) * _largest_rollout_weight(case, exact)
    return max(distilled, most("advantages") * ratio + _pull(case, exact)) * weights + penalty


def _pull(case: Case, exact: Results) -> float:
    """How much a policy loss draws a log-prob to the old policy's, whatever the advantage."""
    if case.inputs["old_log_probs"] is None:
        return 0.0
    options = case.config.policy_options()
    by_gap = 2.0 * options.get("penalty", 0.0) + options.get("beta", 0.0)
    return by_gap * _gaps(exact, case.inputs["old_log_probs"]) + options.get("coefficient", 0.0)


def _log_prob_product(case: Case, exact: Results) -> float:
    """What the sampled token's loss multiplies: two log-probs, the teacher's among them."""
    student, own = largest(finite(exact["log_probs"])), teacher_transform_of(case.config)
    if case.inputs.get("support_ids") is not None:
        # What is multiplied is over the whole vocabulary.
        valid, ids = case.inputs["mask"], case.inputs["target_ids"]
        ids = ids.flatten() if valid is None else ids[valid]
        log_probs = transform(_logits(case, ""), **transform_of(case.config)).log_softmax(-1)
        student = max(student, largest(finite(log_probs.gather(1, ids[:, None]))))
    slope = own["logit_scale"] / own["temperature"]
    known = case.inputs.get("teacher_hidden") is not None
    teacher = 2.0 * slope * largest_logit(case, "teacher_") if known else 0.0
    return (1.0 + student) * (1.0 + max(student, teacher))


def _largest_rollout_weight(case: Case, exact: Results) -> float:
    """Of a rollout correction, at most."""
    correction = case.config.rollout_correction
    if correction is None or correction.level is None:
        return 1.0
    if correction.weight_max is not None:
        return max(correction.weight_max, 1.0)
    rollout, old = case.inputs["rollout_log_probs"], case.inputs["old_log_probs"]
    gap = _gaps(exact, rollout) if old is None else largest(finite(old.double() - rollout.double()))
    return math.exp(min(gap, 20.0))


def _steepest_kl(case: Case, exact: Results) -> float:
    """The largest derivative of a KL estimate."""
    config, ref, old = case.config, case.inputs["ref_log_probs"], case.inputs["old_log_probs"]
    if config.kl_coef == 0 or config.kl_type == "k1":
        return 1.0
    gaps = _gaps(exact, ref)
    if "k3" not in config.kl_type:
        return gaps
    bound = config.log_ratio_clamp or LARGEST_LOG_RATIO
    ratio = _gaps(exact, old) if config.kl_type == "k3_weighted" and old is not None else 0.0
    return (1.0 + gaps) * math.exp(min(gaps, bound) + min(ratio, bound))


def _gaps(exact: Results, others: Tensor) -> float:
    return largest(finite(exact["log_probs"] - others.double()))
