"""How far a result may be from the oracle's: as far as rounding explains, a line for each allowance."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.comparison import Results, largest
from tests.fuzz.calls import library, oracle
from tests.fuzz.case import Case
from tests.fuzz.models import Inputs, to_dtypes
from tests.fuzz.sizes import bounded, finite, largest_logit, probability_size, weight_growth
from tests.inputs import teacher_transform_of, transform_of

# Plain torch of the same precision is off by chance: its error is the largest of three orders of its sums, and a result
# may be this many times as far off.
_TIMES_NAIVE = 3.0
# What the oracle's own result changes by when its inputs are rounded once more: no implementation can do better.
_TIMES_ROUNDING = 4.0
# A result is a few operations away from the sums it is made of, each of which rounds it.
_ROUNDINGS = 8.0
# Beyond this share of the largest number, an intermediate result may overflow and another order of it not.
_NEAR_OVERFLOW = 2.0**-8
_HUGE_LOGITS = 1e9
# What is never of the other sign, in exact arithmetic or in plain torch's log-softmax.
_SIGNS = {"log_probs": -1.0, "entropy": 1.0, "teacher_entropy": 1.0, "divergence": 1.0}
_FLOATING_ROWS = (
    "old_log_probs", "ref_log_probs", "rollout_log_probs", "log_probs", "teacher_log_probs", "teacher_topk_log_probs",
    "entropy",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One quantity of a case; ``reason`` says in words what is wrong, None where only the error counts."""

    quantity: str
    error: float
    allowed: float
    reason: str | None = None

    @property
    def ratio(self) -> float:
        """Error over allowed error; infinite where something is wrong whatever the error."""
        if self.reason is not None:
            return math.inf
        if self.error == 0.0:
            return 0.0
        return self.error / self.allowed if self.allowed else math.inf

    @property
    def passed(self) -> bool:
        return self.ratio <= 1.0


def judge(case: Case) -> list[Finding]:
    """A finding for every quantity of a case; one of the name ``call`` where the library raises."""
    names = [name for name, x in case.inputs.items() if isinstance(x, Tensor) and x.is_floating_point()]
    wide = to_dtypes(case.inputs, dict.fromkeys(names, torch.float64))
    order = torch.Generator().manual_seed(case.seed)
    exact = oracle(case, wide)
    naive = [oracle(case, case.inputs, shuffle) for shuffle in (None, order, order)]
    # Any factor of all logits, such as that of a change of base, is rounded too.
    factor = 1 + _rounding(case.dtype)
    scaled = replace(case, config=replace(case.config, temperature=case.config.temperature * factor))
    rounded = [oracle(scaled, _rounded_inputs(case, wide, order, alike)) for alike in (False, False, False, True)]
    at_borders = [oracle(case, _moved_log_probs(case, wide, by)) for by in (-_TIMES_ROUNDING, _TIMES_ROUNDING)]
    try:
        actual = library(case)
    except Exception as error:
        return [Finding("call", math.nan, 0.0, f"raised {type(error).__name__}: {error}")]
    if actual.keys() != exact.keys():
        return [Finding("call", math.nan, 0.0, f"returned {sorted(actual)}, expected {sorted(exact)}")]
    spoilt = _overflows(case, actual, exact)
    findings = [
        _compare(
            case,
            name,
            actual[name],
            value,
            *([x[name] for x in y] for y in (naive, rounded, at_borders)),
            exact,
            spoilt,
        )
        for name, value in exact.items()
        if name != "metric nonfinite_rows"
    ]
    # Where roundings alone may be more than a dtype holds, nothing follows from a result that is not finite.
    doubtful = {x.quantity for x in findings if x.quantity in actual and x.allowed >= _limit(actual[x.quantity])}
    return findings + _rules(case, actual, exact, doubtful)


def _rounded_inputs(case: Case, wide: Inputs, order: torch.Generator, alike: bool) -> Inputs:
    """The oracle's inputs, as if an fp32 (fp64) computation had rounded what it makes of them.

    Up or down by chance, or all ``alike``, as a rounded factor of all logits does: over many rows that adds up.
    """
    unit = _rounding(case.dtype)

    def sign(x: Tensor) -> Tensor:
        return torch.ones_like(x) if alike else 2 * torch.randint(0, 2, x.shape, generator=order).double() - 1

    rounded = dict(wide)
    for name in _FLOATING_ROWS:
        if wide.get(name) is not None:
            # A log-prob is rounded at its own size, before it is subtracted from another.
            rounded[name] = wide[name] * (1 + unit * sign(wide[name]))
    if "weight" not in wide:
        return rounded
    if wide.get("teacher_hidden") is not None and wide["teacher_weight"] is None:
        # The two models' logits are rounded apart, although they share a head.
        rounded |= {"teacher_weight": wide["weight"], "teacher_bias": wide["bias"]}
    exact_logits = _has_exact_logits(case)
    for name in ("weight", "hidden", "teacher_weight", "teacher_hidden"):
        if rounded.get(name) is not None and not exact_logits:
            # A logit is a sum of rounded products, and what a softcap makes of one is rounded too.
            rounded[name] = rounded[name] * (1 + unit * sign(rounded[name]))
    # A log-prob is the difference of a logit and a log-sum-exp: rounded at the size of the latter.
    vocab_size = len(wide["weight"])
    for model, own in (("", transform_of(case.config)), ("teacher_", teacher_transform_of(case.config))):
        name, slope = f"{model}bias", own["logit_scale"] / own["temperature"]
        if rounded.get(f"{model}weight") is not None:
            by = unit * ((1 + math.log(vocab_size)) / slope + (0.0 if exact_logits else largest_logit(case, model)))
            bias = torch.zeros(vocab_size, dtype=torch.float64) if rounded.get(name) is None else rounded[name]
            rounded[name] = bias + by * sign(bias)
    return rounded


def _moved_log_probs(case: Case, wide: Inputs, by: float) -> Inputs:
    """The oracle's inputs with every log-prob of another model moved ``by`` roundings, all up or all down.

    They are compared with ours, which are rounded at the size of the logits where these are.
    """
    unit, logit = by * _rounding(case.dtype), 0.0
    if "weight" in wide and not _has_exact_logits(case):
        logit = case.config.logit_scale / case.config.temperature * largest_logit(case, "")
    return wide | {
        name: wide[name] + unit * (1 + wide[name].abs() + logit)
        for name in _FLOATING_ROWS
        if wide.get(name) is not None
    }


def _has_exact_logits(case: Case) -> bool:
    return case.exact_products and case.config.softcap is None


def _rounding(dtype: torch.dtype) -> float:
    """A relative change as large as a rounding; in fp64 twice that, for it must not be rounded away itself."""
    return torch.finfo(dtype).eps / (1 if dtype == torch.float64 else 2)


def _compare(
    case: Case, name: str, actual: Tensor, exact: Tensor, naive: list[Tensor], rounded: list[Tensor],
    at_borders: list[Tensor], results: Results, spoilt: bool,
) -> Finding:  # fmt: skip
    ours, exact = actual.double(), exact.double()
    info, limit = torch.finfo(_floating(actual)), _limit(actual)
    if ours.shape != exact.shape:
        return Finding(name, math.nan, 0.0, f"has shape {list(ours.shape)}, expected {list(exact.shape)}")
    within = exact.abs() <= limit * _NEAR_OVERFLOW
    if spoilt:
        within &= ours.isfinite()
    beyond = ~(exact.abs() <= limit / _NEAR_OVERFLOW)
    # A rounding that decides about a clip makes it nothing.
    decided = any(bool((x[beyond].abs() <= limit).any()) for x in (*naive, *rounded, *at_borders))
    if beyond.any() and ours.isfinite().all() and not spoilt and not decided:
        return Finding(name, math.nan, 0.0, f"is finite where {exact[beyond][0]:.3g} is right, and no row is counted")
    # What a dtype cannot hold has been rounded with the rest.
    unit, scale = torch.finfo(case.dtype).eps / 2, largest(finite(exact))
    exact, ours = exact[within], ours[within]
    # Where plain torch overflows it says nothing.
    off_naive = max(largest(finite(x.double()[within] - exact)) for x in naive)
    off_rounded = max(largest(finite(x.double()[within] - exact)) for x in rounded)
    # A softcap's logits are rounded after it: where it is flat, the rounding of what it takes does not show that.
    # Nor does that of a teacher's logits, which are turned into the student's units.
    once = case.config.softcap is None and case.config.teacher_transform is None
    roundings = _TIMES_ROUNDING * (1 if once else 2)
    allowed = _TIMES_NAIVE * off_naive + roundings * off_rounded + _ROUNDINGS * unit * scale
    # A ratio whose rounding takes it over the border of a clip is clipped, and has another gradient.
    allowed += max(largest(finite(x.double()[within] - exact)) for x in at_borders)
    # The result itself is rounded to its dtype, which for fp16 may be below its smallest number.
    allowed += info.eps / 2 * scale + info.smallest_normal * info.eps
    allowed += 2 * unit * (probability_size(case, name, results) + weight_growth(case, name) * scale)
    if case.dtype == torch.float64:
        # The oracle is rounded as well.
        allowed *= 2
    if not ours.isfinite().all():
        if allowed < limit:
            return Finding(name, math.nan, 0.0, f"is not finite where {scale:.3g} at most is right")
        exact, ours = exact[ours.isfinite()], ours[ours.isfinite()]
    return Finding(name, largest(ours - exact), allowed)


def _floating(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else torch.float64


def _limit(x: Tensor) -> float:
    return torch.finfo(_floating(x)).max


def _overflows(case: Case, actual: Results, exact: Results) -> bool:
    """Whether fp32 cannot hold a right result, and the library says so: what such a row adds to says nothing."""
    beyond = any(bool((~(x.abs() <= _limit(actual[name]) / _NEAR_OVERFLOW)).any()) for name, x in exact.items())
    # Logits of 1e10 are off by more than the gap between two probabilities: a result is right, or is not finite.
    huge = case.options.get("logits", 0.0) >= _HUGE_LOGITS
    counts = actual.get("metric nonfinite_rows")
    return (beyond or huge) and bool(counts > 0) if counts is not None else huge


def _rules(case: Case, actual: Results, exact: Results, doubtful: set[str]) -> list[Finding]:
    """What must hold whatever the rounding."""
    findings = []
    for name, sign in _SIGNS.items():
        if name == "divergence" and (bounded(case) or case.config.distillation_mode != "full"):
            # Without its largest entries, or of two sums over a few tokens, or what has only the gradient of one.
            continue
        if name in actual and case.operation in ("srpo_loss", "token_stats", "fused_loss", "teacher_stats"):
            worst = float((sign * actual[name]).min()) if actual[name].numel() else 0.0
            if worst < 0:
                findings.append(Finding(f"sign of {name}", -worst, 0.0, f"is {sign * worst:.3g}, of the wrong sign"))
    if case.operation == "srpo_loss":
        findings += _count_rules({name: x for name, x in actual.items() if name not in doubtful}, exact)
    return findings


def _count_rules(actual: Results, exact: Results) -> list[Finding]:
    """``nonfinite_rows`` counts every row whose loss or gradient is not finite, and no other."""
    counted, broken = float(actual["metric nonfinite_rows"]), {}
    for name, value in actual.items():
        if name == "loss" or name.startswith("grad"):
            # When rows are counted, nobody knows what a gradient is multiplied with and rounded to: fp16 ends at 65504.
            fits = (exact[name].abs() <= _limit(value) * _NEAR_OVERFLOW) | (value.dtype == torch.float32)
            broken[name] = ~value.isfinite() & fits
    rows = int(broken["grad hidden"].any(-1).sum()) if "grad hidden" in broken else 0
    least = max(rows, int(any(bool(x.any()) for x in broken.values())))
    if counted < least:
        reason = f"counts {counted:g}, and {least} rows at least have a loss or a gradient that is not finite"
        return [Finding("nonfinite_rows", math.nan, 0.0, reason)]
    if counted and all(bool(actual[name].isfinite().all()) for name in broken):
        return [Finding("nonfinite_rows", counted, 0.0, f"counts {counted:g}, and all is finite")]
    return []
