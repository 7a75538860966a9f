"""Policy rows over the tokens that they were sampled from: log-probs, ratios and entropies of a top-k or a top-p."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import reference
import srpo_kernels as sk
from tests.comparison import assert_as_accurate, assert_same, condition_of, run_loss
from tests.strategies import Inputs, cast, each_backend, for_backend, loss_inputs, random_support

OPTIONS: list[dict[str, Any]] = [
    {},
    {"loss_type": "gspo", "entropy_coef": 0.1},
    {"loss_type": "kl_cov", "loss_options": {"share": 1.0}, "kl_coef": 0.1},
    {"count_inactive": True, "softcap": 10.0, "temperature": 0.7},
    {"distillation_mode": "topk", "topk": 4},
]


def batch(config: sk.SRPOConfig, k: int, rows: tuple[int, ...] = (5, 6)) -> Inputs:
    inputs = loss_inputs(1, rows, teacher_size=5, config=config)
    return inputs | {"support_ids": random_support(inputs["target_ids"], 33, k)}


@each_backend
@pytest.mark.parametrize("k", [1, 5, 33])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_parity(options: dict[str, Any], k: int, backend: str) -> None:
    config = sk.SRPOConfig(**options)
    for rows in ((5, 6), (23,)):
        inputs = for_backend(batch(config, k, rows), backend)
        exact = run_loss(reference.srpo_loss, cast(inputs, torch.float64), config=config)
        actual = run_loss(sk.srpo_loss, inputs, config=config, backend=backend)
        if backend == "torch":
            assert_same(actual, exact, 1e-9)
        else:
            naive = run_loss(reference.srpo_loss, inputs, config=config)
            assert_as_accurate(actual, naive, exact, condition=condition_of(config, exact))


def test_the_whole_vocabulary_changes_nothing() -> None:
    config = sk.SRPOConfig(entropy_coef=0.1)
    inputs = loss_inputs(1, (5, 6), teacher_size=5)
    everything = torch.arange(33).expand(5, 6, 33)
    expected = run_loss(sk.srpo_loss, inputs, config=config)
    assert_same(run_loss(sk.srpo_loss, inputs | {"support_ids": everything}, config=config), expected, 1e-9)


def test_one_token_alone_has_no_gradient() -> None:
    config = sk.SRPOConfig()
    inputs = loss_inputs(1, (5, 6)) | {"sdpo_mask": None, "teacher_hidden": None}
    inputs["support_ids"] = inputs["target_ids"][..., None]
    out = run_loss(sk.srpo_loss, inputs, config=config)
    assert (out["log_probs"] == 0).all()
    assert (out["grad weight"] == 0).all() and (out["grad hidden"] == 0).all()


def test_rows_that_are_not_of_the_policy_are_not_read() -> None:
    config = sk.SRPOConfig()
    inputs = batch(config, 5)
    unread = ~(inputs["mask"] & ~inputs["sdpo_mask"][:, None])[..., None]
    spoilt = {"support_ids": inputs["support_ids"].masked_fill(unread, 2**40)}
    expected = run_loss(sk.srpo_loss, inputs, config=config)
    assert_same(run_loss(sk.srpo_loss, inputs | spoilt, config=config), expected, 0.0)


@pytest.mark.parametrize(
    ("support_ids", "error", "message"),
    [
        (torch.zeros(5, 6), TypeError, "support_ids must be"),
        (torch.zeros(5, 6, dtype=torch.int64), ValueError, r"support_ids must have shape .*'K'.*got \[5, 6\]"),
        (torch.zeros(5, 6, 0, dtype=torch.int64), ValueError, r"with K >= 1, got \[5, 6, 0\]"),
        (torch.full((5, 6, 1), 33), ValueError, "support_ids must be below 33, .*got 33"),
        (
            torch.zeros(5, 6, 2, dtype=torch.int64),
            ValueError,
            r"support_ids must be distinct in each row, got \[0, 0\]",
        ),
    ],
)
def test_what_is_refused(support_ids: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sk.srpo_loss(**loss_inputs(1, (5, 6)), support_ids=support_ids)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("frozen", ["", "hidden", "weight"])
def test_the_columns_of_the_head_are_as_exact_as_all_of_it(softcap: float | None, frozen: str) -> None:
    # A support that is small beside the vocabulary: no logits of the row but these.
    config = sk.SRPOConfig(loss_type="gspo", entropy_coef=0.1, softcap=softcap, temperature=0.7, logit_scale=0.5)
    inputs = loss_inputs(1, (5, 6), vocab_size=400, teacher_size=5, config=config)
    inputs["support_ids"] = random_support(inputs["target_ids"], 400, 6)
    leaves = tuple(name for name in ("hidden", "weight", "bias") if name != frozen)
    expected = run_loss(reference.srpo_loss, inputs, leaves, config=config)
    assert_same(run_loss(sk.srpo_loss, inputs, leaves, config=config), expected, 1e-9)
    for dtype in (torch.float32, torch.bfloat16):
        rounded = cast(inputs, dtype)
        exact = run_loss(reference.srpo_loss, cast(rounded, torch.float64), leaves, config=config)
        naive = run_loss(reference.srpo_loss, rounded, leaves, config=config)
        actual = run_loss(sk.srpo_loss, rounded, leaves, config=config)
        assert_as_accurate(actual, naive, exact, condition=condition_of(config, exact))


def test_the_columns_cost_no_product() -> None:
    def floating(vocab_size: int, **options: Any) -> int:
        inputs = loss_inputs(1, (5, 6), vocab_size=vocab_size) | {"sdpo_mask": None, "teacher_hidden": None}
        inputs |= {
            "mask": None,
            "advantages": torch.ones(5),
            "support_ids": random_support(inputs["target_ids"], vocab_size, 2),
        }
        with FlopCounterMode(display=False) as counter:
            run_loss(sk.srpo_loss, inputs, config=sk.SRPOConfig(**options))
        return counter.get_total_flops()

    assert floating(4000) == floating(400) < floating(90)
