"""What is checked: every group of options of every public function, each on a batch that has all kinds of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

from srpo_kernels import LogitTransform, RolloutCorrection, SRPOConfig
from srpo_kernels.losses.options import KL_TYPES
from srpo_kernels.losses.registry import POLICY_LOSSES
from srpo_kernels.rows.mixture import MIXTURE_DIVERGENCES, has_mixture
from srpo_kernels.rows.spec import DIVERGENCES
from srpo_kernels.verify import forms
from srpo_kernels.verify.inputs import (
    REALISTIC,
    Case,
    Op,
    Size,
    given_topk,
    given_topk_and_support,
    of_a_larger_batch,
    per_token,
    poison,
    routed_teacher,
    several_teachers,
    support,
    without,
)

# A group is a row of the table; its first entry stands for it in a quick run.
_TRANSFORMS: list[dict[str, Any]] = [
    {"softcap": 5.0, "temperature": 0.7, "logit_scale": 0.5},
    {"softcap": 5.0},
    {"temperature": 0.7},
    {"logit_scale": 0.5},
]
# Another model's, where neither has a softcap, and where one of both does.
_TEACHER_TRANSFORMS: list[dict[str, Any]] = [
    {"softcap": 5.0, "teacher_transform": LogitTransform(0.9, 1.3)},
    {"softcap": 5.0, "teacher_transform": LogitTransform(0.9, 1.3), "divergence": "reverse_kl"},
    {"teacher_transform": LogitTransform(0.9, 1.3, 5.0)},
    {"temperature": 0.7, "teacher_transform": LogitTransform(0.9, 1.3)},
    {"temperature": 0.7, "teacher_transform": LogitTransform(0.9, 1.3), "divergence": "forward_kl"},
]
_DIVERGENCES: list[dict[str, Any]] = [
    {"divergence": "jsd"},
    *({"divergence": x} for x in DIVERGENCES if x != "jsd"),
    *({"divergence": x, "alpha": 0.1} for x in MIXTURE_DIVERGENCES),
]
_LOSS_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "clips": [
        {"delta": 1.5, "dual_clip": 1.2},
        {"delta": 1.1},
        {"dual_clip": 1.05},
        {"loss_type": "gspo", "delta": 1.1, "dual_clip": 1.05},
        {"log_ratio_clamp": 0.2},
        {"log_ratio_clamp": None},
        {"distillation_is_clip": None},
    ],
    "reference KL": [{"kl_coef": 0.1, "kl_type": x} for x in reversed(KL_TYPES)],
    "entropy bonus": [{"entropy_coef": 0.1}, {"entropy_coef": -0.1, "softcap": 5.0}],
    "divergence": _DIVERGENCES,
    "distillation mode": [
        {"distillation_mode": "topk", "topk": 3},
        {"distillation_mode": "topk", "topk": 100},
        {"distillation_mode": "topk", "topk": 3, "add_tail": False},
        {"distillation_mode": "topk", "topk": 3, "divergence": "reverse_kl", "softcap": 5.0},
        {"distillation_mode": "sampled"},
    ],
    "entropy weights": [{"dw_beta": 4.0}, {"dw_beta": 0.0}],
    "logit transform": [*_TRANSFORMS, *(x | {"softcap": 5.0} for x in _DIVERGENCES[1 : len(DIVERGENCES)])],
    "teacher's own transform": _TEACHER_TRANSFORMS,
    "reduction": [{"reduction": "sequence"}, {"reduction": "constant", "max_length": 9}],
}
# Of the statistics, and of an objective of all of them.
_STATS_OPTIONS = {
    "divergence": _DIVERGENCES,
    "distillation mode": _LOSS_OPTIONS["distillation mode"],
    "logit transform": _TRANSFORMS,
    "teacher's own transform": _TEACHER_TRANSFORMS,
}
_GIVEN: dict[str, Any] = {"distillation_mode": "topk", "topk_of": "teacher"}


def cases(size: Size, *, large: bool, realistic: bool) -> list[Case]:
    """Every case, of ``size`` where nothing else is its point; ``large`` adds a vocabulary of several kernel blocks.

    ``realistic`` adds the head of a current model.
    """
    small = [*_loss_cases(size), *_fused_cases(size), *_stats_cases(size)]
    for op in ("srpo_loss", "fused_loss", "token_stats"):
        small += _token_cases(op, size)
    small += [Case("teacher_stats", "logit transform", "defaults", size)]
    small += _option_cases("teacher_stats", {"logit transform": _TRANSFORMS}, size)
    shaped = [case for op in get_args(Op) for case in _shape_cases(op, size, large, realistic)]
    return [*small, *shaped, *_tile_cases(size, large, realistic)]


def _option_cases(op: Op, groups: dict[str, list[dict[str, Any]]], size: Size) -> Iterator[Case]:
    for group, options in groups.items():
        for chosen in options:
            name = ", ".join(f"{key}={value}" for key, value in chosen.items())
            yield Case(op, group, name, size, SRPOConfig(**chosen))


def _loss_cases(size: Size) -> Iterator[Case]:
    losses: list[dict[str, Any]] = [{"loss_type": name} for name in POLICY_LOSSES]
    whole: list[dict[str, Any]] = [x for x in losses if POLICY_LOSSES[x["loss_type"]].whole_sequences]
    yield from _option_cases("srpo_loss", {"policy loss": losses} | _LOSS_OPTIONS, size)
    for options in (*whole, {}, {"reduction": "sequence"}, {"reduction": "constant", "max_length": 9}):
        name = ", ".join(map(str, options.values())) or "defaults"
        yield Case("srpo_loss", "packed rows", name, size, SRPOConfig(**options), packed=True)
    yield Case("srpo_loss", "form of the inputs", "normalizers", size, edit=of_a_larger_batch)
    yield Case("srpo_loss", "form of the inputs", "teacher rows of routed sequences alone", size, edit=routed_teacher)
    yield Case("srpo_loss", "form of the inputs", "several teachers", size, edit=several_teachers)
    yield Case("srpo_loss", "form of the inputs", "routes and advantages per token", size, edit=per_token)
    yield Case("srpo_loss", "form of the inputs", "no old log-probs", size, edit=without("old_log_probs"))
    yield from _own_cases(size)
    yield Case("srpo_loss", "form of the inputs", "policy alone", size, edit=without("sdpo_mask", "teacher_hidden"))
    for options in (*whole, {"dw_beta": 30.0}):
        name = ", ".join(map(str, options.values()))
        yield Case("srpo_loss", "chunks of rows", name, size, SRPOConfig(**options), chunked=True)


def _own_cases(size: Size) -> Iterator[Case]:
    """Log-probs of a rollout engine, and divergences that rows have of their own."""
    for correction in (RolloutCorrection.tis(), RolloutCorrection.mis(), RolloutCorrection.icepop()):
        config = SRPOConfig(rollout_correction=correction)
        name = f"{correction.outside} in [{correction.weight_min}, {correction.weight_max}]"
        yield Case("srpo_loss", "rollout", name, size, config, edit=forms.rollout)
    for config in (SRPOConfig(), SRPOConfig(softcap=5.0)):
        name = f"softcap={config.softcap}"
        yield Case("srpo_loss", "a divergence by row", name, size, config, edit=forms.own_divergences)
    for divergence in DIVERGENCES:
        config = SRPOConfig(divergence=divergence, divergence_clip=0.02)
        yield Case("srpo_loss", "a divergence by row", f"{divergence} with a bound", size, config)


def _token_cases(op: Op, size: Size) -> Iterator[Case]:
    """What rows were sampled from, and teachers that are their likeliest tokens: by logits, and by columns."""
    bonus = SRPOConfig(entropy_coef=0.1, softcap=5.0)
    for name, shape in {"": size, ", columns of the head": size._replace(vocab_size=1009)}.items():
        yield Case(op, "sampling support", f"6 tokens{name}", shape, bonus, edit=support)
    for divergence in DIVERGENCES:
        for add_tail in (True, False):
            config = SRPOConfig(divergence=divergence, add_tail=add_tail, **_GIVEN)
            name = f"{divergence}, add_tail={add_tail}"
            yield Case(op, "teacher as top-k", name, size, config, edit=given_topk)
    yield Case(op, "teacher as top-k", "beside a support", size, config, edit=given_topk_and_support)
    columns = size._replace(vocab_size=1009)
    yield Case(op, "teacher as top-k", "by columns", columns, config, edit=given_topk_and_support)


def _fused_cases(size: Size) -> Iterator[Case]:
    yield from _option_cases("fused_loss", _STATS_OPTIONS, size)
    yield Case("fused_loss", "form of the inputs", "packed rows", size, packed=True)
    yield Case("fused_loss", "form of the inputs", "every row has a teacher", size, edit=without("sdpo_mask"))


def _stats_cases(size: Size) -> Iterator[Case]:
    yield from _option_cases("token_stats", _STATS_OPTIONS, size)
    yield Case("token_stats", "form of the inputs", "packed rows", size, packed=True)
    yield Case("token_stats", "form of the inputs", "no teacher", size, edit=without("teacher_hidden"))


def _shape_cases(op: Op, size: Size, large: bool, realistic: bool) -> Iterator[Case]:
    yield Case(op, "masked rows", "NaN in them", size, edit=poison)
    yield Case(op, "head", "teacher of another width", size, teacher_size=24)
    yield Case(op, "head", "no bias", size, edit=without("bias"))
    if op != "teacher_stats":
        yield Case(op, "head", "frozen weight", size, leaves=("hidden", "bias"))
    yield Case(op, "chunks of rows", "defaults", size, chunked=True)
    for vocab_size in (1009, 33, 2, 1):
        yield Case(op, "vocabulary", str(vocab_size), size._replace(vocab_size=vocab_size))
    if large:
        yield Case(op, "vocabulary", "5003", size._replace(vocab_size=5003))
        yield Case(op, "vocabulary", "5003, softcap", size._replace(vocab_size=5003), SRPOConfig(softcap=5.0))
    if realistic:
        yield Case(op, "realistic head", "1024 × 151936", REALISTIC, edit=without("bias"))


def _tile_cases(size: Size, large: bool, realistic: bool) -> Iterator[Case]:
    """The engine without logits, which has no gradient and no divergence from a mixture."""
    sizes = {"5003": size._replace(vocab_size=5003)} if large else {}
    sizes |= {"1024 × 151936": REALISTIC} if realistic else {}
    for divergence in DIVERGENCES:
        if not has_mixture(divergence):
            capped = SRPOConfig(divergence=divergence, **_TRANSFORMS[0])
            case = Case("token_stats", "engine=tile", divergence, size, capped, engine="tile", leaves=(), edit=poison)
            yield case
            yield replace(case, name=f"{divergence}, no softcap", config=SRPOConfig(divergence=divergence))
    yield replace(case, name="teacher of another width", teacher_size=24)
    yield replace(case, name="no teacher", edit=without("teacher_hidden"))
    for name, shape in sizes.items():
        yield replace(case, name=name, size=shape, edit=without("bias"))
    for name, shape in {"defaults": size, **sizes}.items():
        yield replace(case, op="teacher_stats", name=name, size=shape)
