"""A teacher with a logit transform of its own: another model's scale, softcap and temperature."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import reference
import srpo_kernels as sk
from srpo_kernels.rows.spec import DIVERGENCES
from tests.comparison import assert_as_accurate, assert_same, run_loss, run_stats
from tests.inputs import cast, for_backend, loss_inputs, transform_of, workspace_floor
from tests.parity import check_loss_in
from tests.strategies import each_backend, shapes

# Student and teacher, with a softcap or without: the teacher's logits are larger, smaller, beyond the student's cap.
PAIRS = {
    "scales": ({"temperature": 0.7}, sk.LogitTransform(1.3, 0.5)),
    "the teacher's softcap": ({"logit_scale": 0.5}, sk.LogitTransform(0.8, 1.5, 4.0)),
    "the student's softcap": ({"softcap": 3.0, "temperature": 0.8}, sk.LogitTransform(0.6, 2.0)),
    "two softcaps": ({"softcap": 3.0}, sk.LogitTransform(softcap=9.0)),
}
EACH_PAIR = pytest.mark.parametrize("pair", PAIRS)
STATS = ("hidden", "weight", "target_ids", "bias", "mask", "teacher_hidden", "teacher_weight", "teacher_bias")


def config_of(pair: str, **options: Any) -> sk.SRPOConfig:
    student, teacher = PAIRS[pair]
    return sk.SRPOConfig(**student, teacher_transform=teacher, **options)


@each_backend
@EACH_PAIR
@pytest.mark.parametrize(
    "options",
    [
        *({"divergence": x, "alpha": 0.3} for x in DIVERGENCES),
        {"distillation_mode": "topk", "topk": 3},
        {"distillation_mode": "topk", "topk": 3, "topk_of": "teacher"},
        {"distillation_mode": "sampled", "entropy_coef": 0.1},
        {"dw_beta": 30.0},
    ],
    ids=str,
)
def test_the_loss(options: dict[str, Any], pair: str, backend: str) -> None:
    config = config_of(pair, **options)
    inputs = loss_inputs(1, shapes(backend)[0], teacher_size=5, config=config)
    check_loss_in(inputs, config, backend)
    if backend == "torch":
        check_loss_in(inputs, config, backend, workspace_bytes=2 * workspace_floor(33, 8, 2))


@each_backend
@EACH_PAIR
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_statistics(divergence: str, pair: str, backend: str) -> None:
    student, teacher = PAIRS[pair]
    rows = shapes(backend)[0]
    inputs = for_backend({name: loss_inputs(1, rows, teacher_size=5)[name] for name in STATS}, backend)
    options = {**student, "teacher_transform": teacher, "divergence": divergence}
    upstream = torch.randn(4, *rows, dtype=torch.float64)
    exact = run_stats(reference.token_stats, cast(inputs, torch.float64), upstream, **options)
    actual = run_stats(sk.token_stats, inputs, upstream, backend=backend, **options)
    if backend == "torch":
        assert_same(actual, exact, 1e-9)
    else:
        assert_as_accurate(actual, run_stats(reference.token_stats, inputs, upstream, **options), exact)


@each_backend
@EACH_PAIR
def test_fused_loss_and_the_statistics_have_one(pair: str, backend: str) -> None:
    inputs = for_backend({name: loss_inputs(1, (5, 6), teacher_size=5)[name] for name in STATS}, backend)
    config = config_of(pair)
    loss = sk.fused_loss(
        **inputs, objective=lambda rows: rows.divergence - rows.teacher_entropy, config=config, backend=backend
    ).loss
    stats = sk.token_stats(**inputs, config=config, backend=backend)
    assert stats.divergence is not None and stats.teacher_entropy is not None
    torch.testing.assert_close(loss, (stats.divergence - stats.teacher_entropy).sum())
    teacher = {name: inputs[name] for name in ("teacher_hidden", "teacher_weight", "teacher_bias", "mask")}
    entropy = sk.teacher_stats(**teacher, config=config, backend=backend).entropy
    torch.testing.assert_close(entropy, stats.teacher_entropy)


@EACH_PAIR
def test_normalizers_of_the_config_are_those_of_the_loss(pair: str) -> None:
    config = config_of(pair)
    inputs = loss_inputs(1, (5, 6), teacher_size=5, config=config)
    teacher = {name: inputs[name] for name in ("teacher_hidden", "teacher_weight", "teacher_bias")}
    entropy = sk.teacher_stats(**teacher, config=config).entropy
    norms = sk.Normalizers.from_batch(inputs["mask"], inputs["sdpo_mask"], entropy, config=config)
    torch.testing.assert_close(
        sk.srpo_loss(**inputs, config=config, normalizers=norms).loss, sk.srpo_loss(**inputs, config=config).loss
    )


def test_the_students_own_is_none() -> None:
    options = {"temperature": 0.7, "softcap": 5.0}
    inputs = loss_inputs(1, (5, 6), teacher_size=5)
    expected = run_loss(sk.srpo_loss, inputs, config=sk.SRPOConfig(**options))
    own = sk.SRPOConfig(**options, teacher_transform=sk.LogitTransform(**options))
    assert_same(run_loss(sk.srpo_loss, inputs, config=own), expected, 0.0)


@each_backend
@EACH_PAIR
@pytest.mark.parametrize("who", ["both", "teacher"])
def test_excluded_tokens(who: str, pair: str, backend: str) -> None:
    inputs = loss_inputs(1, shapes(backend)[0], teacher_size=5, config=config_of(pair))
    banned = torch.tensor([3, 7, 32])
    inputs["target_ids"] = inputs["target_ids"].where(~torch.isin(inputs["target_ids"], banned), 0)
    for name in ("bias", "teacher_bias") if who == "both" else ("teacher_bias",):
        inputs[name][banned] = -torch.inf
    for divergence in DIVERGENCES:
        check_loss_in(inputs, config_of(pair, divergence=divergence, distillation_is_clip=None), backend)


def test_a_compiled_graph_has_it_too() -> None:
    config = config_of("two softcaps")
    inputs = loss_inputs(1, (5, 6), teacher_size=5, config=config)
    compiled = torch.compile(sk.srpo_loss, backend="aot_eager", fullgraph=True)
    assert_same(run_loss(compiled, inputs, config=config), run_loss(sk.srpo_loss, inputs, config=config), 1e-12)
    call = {name: inputs[name] for name in STATS} | {"teacher_transform": config.teacher_transform}
    stats = torch.compile(lambda **call: sk.token_stats(**call).divergence, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(stats(**call), sk.token_stats(**call).divergence)


@pytest.mark.parametrize(
    ("transform", "error", "message"),
    [
        ((1.0, 1.0, None), TypeError, "teacher_transform must be a LogitTransform or None, got tuple"),
        ({"softcap": 3.0}, TypeError, "teacher_transform must be a LogitTransform or None, got dict"),
        (sk.LogitTransform(temperature=0.0), ValueError, r"teacher_transform.temperature must be .*> 0, got 0.0"),
        (sk.LogitTransform(temperature=True), TypeError, r"teacher_transform.temperature must be a number.*got True"),
        (sk.LogitTransform(logit_scale=-1.0), ValueError, r"teacher_transform.logit_scale must be .*> 0, got -1.0"),
        (sk.LogitTransform(softcap="3"), TypeError, r"teacher_transform.softcap must be a number.*got '3'"),  # type: ignore[arg-type]
        (sk.LogitTransform(softcap=1e38), ValueError, r"teacher_transform.softcap must be in \[1e-37, 1e37\]"),
    ],
)
def test_what_is_refused(transform: Any, error: type[Exception], message: str) -> None:
    inputs = loss_inputs(1, (5, 6), teacher_size=5)
    with pytest.raises(error, match=message):
        sk.SRPOConfig(teacher_transform=transform)
    with pytest.raises(error, match=message):
        sk.token_stats(**{name: inputs[name] for name in STATS}, teacher_transform=transform)


def test_transforms_too_far_apart_are_refused() -> None:
    with pytest.raises(ValueError, match=r"teacher's largest slope over the student's must be in .*got 1e\+40"):
        sk.SRPOConfig(temperature=1e20, teacher_transform=sk.LogitTransform(temperature=1e-20))


@pytest.mark.kernels
def test_tiles_have_one_transform() -> None:
    inputs: dict[str, Tensor] = cast({name: loss_inputs(1, (5, 6))[name] for name in STATS}, torch.float32)
    with pytest.raises(ValueError, match="engine='tile' takes one logit transform for both models"):
        sk.token_stats(
            **inputs, engine="tile", backend="triton", divergence="forward_kl",
            teacher_transform=sk.LogitTransform(2.0),
        )  # fmt: skip
    assert transform_of(sk.SRPOConfig()) == sk.LogitTransform()._asdict()
