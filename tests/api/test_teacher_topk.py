"""A teacher of which the likeliest tokens are all that is known, as an inference server returns them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import srpo_kernels as sk
from srpo_kernels.rows.mixture import Divergence
from srpo_kernels.rows.spec import DIVERGENCES
from tests.comparison import assert_same, run_loss, run_stats
from tests.inputs import Inputs, cast, head_inputs, loss_inputs, random_support, with_given_topk
from tests.parity import check_loss_in, check_stats_in, coefficients
from tests.strategies import each_backend, shapes

GIVEN: dict[str, Any] = {"distillation_mode": "topk", "topk_of": "teacher"}
MODES: list[dict[str, Any]] = [
    GIVEN | {"topk": 4},
    GIVEN | {"topk": 4, "add_tail": False},
    {"distillation_mode": "topk", "topk": 4},
    {"distillation_mode": "sampled"},
]


def batch(config: sk.SRPOConfig, k: int, rows: tuple[int, ...] = (5, 6), *, fewer: bool = True) -> Inputs:
    return with_given_topk(loss_inputs(1, rows, teacher_size=5, config=config), config, k, fewer=fewer)


@each_backend
@pytest.mark.parametrize("add_tail", [True, False])
@pytest.mark.parametrize("k", [1, 4, 33])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_parity(divergence: Divergence, k: int, add_tail: bool, backend: str) -> None:
    config = sk.SRPOConfig(divergence=divergence, add_tail=add_tail, softcap=20.0, temperature=0.8, **GIVEN)
    for rows in shapes(backend):
        check_loss_in(batch(config, k, rows), config, backend)
        given = with_given_topk(head_inputs(1, rows, 8, 33, teacher_size=5), config, k)
        check_stats_in(given, backend, config=config)


@each_backend
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_statistics_of_every_mode(divergence: Divergence, backend: str) -> None:
    """Beside a support: tokens that are compared are among those that were sampled from, or are not."""
    for options in MODES:
        config = sk.SRPOConfig(divergence=divergence, softcap=9.0, **options)
        for rows in shapes(backend):
            inputs = head_inputs(1, rows, 8, 33, teacher_size=5)
            support = {"support_ids": random_support(inputs["target_ids"], 33, 5)}
            check_stats_in(inputs, backend, config=config)
            check_stats_in(inputs | support, backend, config=config)
            if config.topk_of == "teacher":
                check_stats_in(with_given_topk(inputs, config, 4) | support, backend, config=config)


def test_without_a_config_the_rest_is_one_more_token() -> None:
    inputs = with_given_topk(head_inputs(1, (5, 6), 8, 33), CONFIG, 4)
    upstream = coefficients(inputs)
    expected = run_stats(sk.token_stats, inputs, upstream, config=sk.SRPOConfig(divergence="forward_kl", **GIVEN))
    assert_same(run_stats(sk.token_stats, inputs, upstream, divergence="forward_kl"), expected, 0.0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_it_is_the_top_k_of_the_teachers_logits(divergence: Divergence) -> None:
    # But for the weight by an entropy that a top-k does not know.
    config = sk.SRPOConfig(divergence=divergence, topk=4, dw_beta=0.0, **GIVEN)
    inputs = loss_inputs(1, (5, 6), teacher_size=5, config=config)
    given = with_given_topk(inputs, config, 4, fewer=False)
    expected, actual = (run_loss(sk.srpo_loss, x, config=config) for x in (inputs, given))
    del expected["metric teacher_entropy_sum"], actual["metric teacher_entropy_sum"]
    assert_same(actual, expected, 1e-9)


def test_the_routed_rows_alone() -> None:
    config = sk.SRPOConfig(**GIVEN)
    inputs = batch(config, 4)
    routed = {name: inputs[name][inputs["sdpo_mask"]] for name in ("teacher_topk_ids", "teacher_topk_log_probs")}
    expected = run_loss(sk.srpo_loss, inputs, config=config)
    assert_same(run_loss(sk.srpo_loss, inputs | routed, config=config), expected, 0.0)


def test_rows_without_a_teacher_are_not_read() -> None:
    config = sk.SRPOConfig(**GIVEN)
    inputs = batch(config, 4)
    unread = ~(inputs["mask"] & inputs["sdpo_mask"][:, None])[..., None]
    spoilt = {
        "teacher_topk_ids": inputs["teacher_topk_ids"].masked_fill(unread, 2**40),
        "teacher_topk_log_probs": inputs["teacher_topk_log_probs"].masked_fill(unread, math.nan),
    }
    expected = run_loss(sk.srpo_loss, inputs, config=config)
    assert_same(run_loss(sk.srpo_loss, inputs | spoilt, config=config), expected, 0.0)


@pytest.mark.parametrize("k", [1, 5, 33])
def test_the_entropy_is_a_lower_bound(k: int) -> None:
    log_probs = (3.0 * torch.randn(50, 33, dtype=torch.float64)).log_softmax(-1)
    bound, exact = sk.topk_entropy(log_probs.topk(k).values), torch.special.entr(log_probs.exp()).sum(-1)
    rest = 1.0 - log_probs.topk(k).values.exp().sum(-1)
    assert (bound <= exact + 1e-12).all()
    assert (exact <= bound + rest * math.log(max(33 - k, 1)) + 1e-12).all()


@pytest.mark.parametrize(
    ("log_probs", "error"), [([-1.0], TypeError), (torch.ones(3).long(), TypeError), (torch.tensor(-1.0), ValueError)]
)
def test_an_entropy_of_nothing_is_refused(log_probs: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="log_probs must"):
        sk.topk_entropy(log_probs)


def test_micro_batches_add_up() -> None:
    config = sk.SRPOConfig(**GIVEN)
    inputs = batch(config, 4)
    entropy = sk.topk_entropy(inputs["teacher_topk_log_probs"])
    norms = sk.Normalizers.from_batch(inputs["mask"], inputs["sdpo_mask"], entropy, config=config)
    whole = sk.srpo_loss(**inputs, config=config).loss
    shared = ("weight", "bias", "teacher_weight", "teacher_bias")
    parts = [
        {name: x if name in shared or x is None else x[rows] for name, x in inputs.items()}
        for rows in (slice(0, 2), slice(2, 5))
    ]
    total = sum(sk.srpo_loss(**part, config=config, normalizers=norms).loss for part in parts)
    torch.testing.assert_close(total, whole)


CONFIG = sk.SRPOConfig(**GIVEN)
IDS, LOG_PROBS = torch.zeros(5, 6, 1, dtype=torch.int64), torch.zeros(5, 6, 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"teacher_topk_ids": None}, ValueError, "teacher_topk_log_probs needs teacher_topk_ids, got None"),
        ({"teacher_topk_log_probs": None}, ValueError, "teacher_topk_ids needs teacher_topk_log_probs, got None"),
        ({"sdpo_mask": None}, ValueError, "teacher_topk_ids needs sdpo_mask"),
        ({"teacher_hidden": torch.zeros(5, 6, 8)}, ValueError, "teacher_topk_ids is in place of teacher_hidden"),
        ({"config": sk.SRPOConfig(distillation_mode="topk")}, ValueError, "topk_of='teacher', got 'topk' and 'st"),
        ({"config": sk.SRPOConfig()}, ValueError, "distillation_mode='topk'.*got 'full'"),
        ({"teacher_topk_ids": IDS.float()}, TypeError, "teacher_topk_ids must be"),
        ({"teacher_topk_log_probs": IDS}, TypeError, "teacher_topk_log_probs must be"),
        ({"teacher_topk_ids": IDS[..., 0]}, ValueError, r"teacher_topk_ids must have target_ids' dimensions.*\[5, 6\]"),
        ({"teacher_topk_log_probs": LOG_PROBS[:4]}, ValueError, "teacher_topk_log_probs must have shape"),
        ({"teacher_topk_ids": IDS + 33}, ValueError, "teacher_topk_ids must be below 33, .*got 33"),
        (
            {"teacher_topk_ids": IDS.expand(5, 6, 2), "teacher_topk_log_probs": LOG_PROBS.expand(5, 6, 2)},
            ValueError, r"teacher_topk_ids must be distinct in each row, got \[0, 0\]",
        ),
        ({"teacher_topk_ids": IDS[:1], "teacher_topk_log_probs": LOG_PROBS[:1]}, ValueError, "teacher_"),
    ],
)  # fmt: skip
def test_what_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = cast(batch(CONFIG, 1), torch.float32)
    with pytest.raises(error, match=message):
        sk.srpo_loss(**{**inputs, "config": CONFIG, **change})
    change = {name: x for name, x in change.items() if name != "sdpo_mask"}
    if not change:
        return
    own = {name: inputs[name] for name in ("hidden", "weight", "target_ids", "bias", "mask")}
    own |= {name: inputs[name] for name in ("teacher_topk_ids", "teacher_topk_log_probs")} | {"config": CONFIG}
    for function, more in ((sk.token_stats, {}), (sk.fused_loss, {"objective": lambda rows: rows.divergence})):
        with pytest.raises(error, match=message):
            function(**{**own, **more, **change})
