"""The Triton backend against the oracle, in blocks that are smaller than the vocabulary.

Without a GPU the kernels run in Triton's interpreter, a thousand times slower than torch: examples are few.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from triton.runtime import interpreter

import reference
from srpo_kernels import SRPOConfig, srpo_loss, token_stats
from srpo_kernels.kernels import launch
from srpo_kernels.losses.options import DISTILLATION_MODES
from srpo_kernels.rows.mixture import MIXTURE_DIVERGENCES
from srpo_kernels.rows.spec import DIVERGENCES
from tests.api.test_loss_parity import EACH_OPTION
from tests.comparison import Results, assert_as_accurate, assert_same, gradients, largest, run_loss, with_leaves
from tests.inputs import Inputs, cast, loss_inputs
from tests.parity import check_loss, check_stats
from tests.rows import test_accuracy
from tests.strategies import Case, loss_cases, stats_cases

pytestmark = pytest.mark.kernels

# Examples of each dtype: a kernel sees fp32 logits whatever the model's.
_MOST = settings().max_examples
EXAMPLES = {torch.float32: _MOST, torch.bfloat16: _MOST // 3, torch.float16: _MOST // 3}
# Less than a block of those below, several of them, and several and a tail, of one word and of nine.
VOCABULARIES = (7, 1, 2, 129, 192, 201)


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    """Blocks of 64 columns of one model, or 32 of two."""
    patch = pytest.MonkeyPatch()
    patch.setattr(launch, "_ROW_LANES", 16)
    yield
    patch.undo()


@pytest.mark.parametrize("dtype", EXAMPLES, ids=str)
def test_the_loss(dtype: torch.dtype) -> None:
    @settings(max_examples=2 * EXAMPLES[dtype])
    @given(case=loss_cases(VOCABULARIES))
    def holds(case: Case) -> None:
        check_loss(case, dtype, "triton")

    holds()


@pytest.mark.parametrize("dtype", EXAMPLES, ids=str)
def test_the_statistics(dtype: torch.dtype) -> None:
    @settings(max_examples=EXAMPLES[dtype])
    @given(case=stats_cases(VOCABULARIES))
    def holds(case: Case) -> None:
        check_stats(case, dtype, "triton")

    holds()


@pytest.mark.parametrize("options", EACH_OPTION, ids=str)
def test_each_option(options: dict[str, Any]) -> None:
    config = SRPOConfig(**options)
    inputs = loss_inputs(3, (6, 4), teacher_size=5, spread=2.0, config=config)
    check_loss(Case(inputs, {"config": config}), torch.float32, "triton")


@pytest.mark.parametrize("mode", DISTILLATION_MODES)
@pytest.mark.parametrize("vocab_size", [4096, 4097, 9001])
def test_blocks_as_they_are_launched(vocab_size: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_ROW_LANES", 1024)
    config = SRPOConfig(distillation_mode=mode, entropy_coef=0.1)
    check_loss(Case(loss_inputs(0, (2, 2), 8, vocab_size, config=config), {"config": config}), torch.float32, "triton")


def peaked(gap: float) -> Inputs:
    """Rows in which one logit is ``gap`` above the rest, in both models, and one in which they disagree."""
    rows = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    rows[:4, 3] += gap
    teacher = rows + 0.1 * torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    teacher[3, 3] -= gap
    return {
        "hidden": rows[None],
        "weight": torch.eye(40),
        "target_ids": torch.tensor([[3, 3, 1, 3, 0]]),
        "sdpo_mask": torch.tensor([True]),
        "teacher_hidden": teacher[None],
    }


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("gap", [12.0, 30.0, 150.0])
def test_rows_with_one_likely_token(gap: float, divergence: str) -> None:
    config = SRPOConfig(divergence=divergence, dw_beta=0.0)
    inputs = peaked(gap)
    actual = run_loss(srpo_loss, inputs, config=config, backend="triton")
    naive, exact = (
        run_loss(reference.srpo_loss, cast(inputs, x), config=config) for x in (torch.float32, torch.float64)
    )
    assert all(x.isfinite().all() for x in actual.values())
    assert_as_accurate(actual, naive, exact)


def test_a_near_certain_row_keeps_its_digits_under_large_logits() -> None:
    inputs = peaked(10.0)
    call = {"hidden": inputs["hidden"] + 1000.0, "weight": inputs["weight"], "target_ids": inputs["target_ids"]}
    actual = token_stats(**call, backend="triton")
    exact = token_stats(**cast(call, torch.float64))
    # A log-sum-exp of 1010 in fp32 would be off by 3e-5, as much as all that is left beside the likely token.
    for name in ("log_probs", "entropy"):
        value, wanted = getattr(actual, name)[0, :2], getattr(exact, name)[0, :2]
        torch.testing.assert_close(value.double(), wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("offset", [0.0, 20.0, 1000.0])
def test_models_that_agree_on_nothing_keep_the_digits_of_their_divergence(offset: float) -> None:
    logits = torch.randn(8, 64) + offset
    teacher = torch.randn(8, 64) + offset
    logits[:, :32] += 40.0
    teacher[:, 32:] += 40.0
    call = {"hidden": logits, "weight": torch.eye(64), "target_ids": torch.zeros(8, dtype=torch.int64)}
    call |= {"teacher_hidden": teacher}

    def run(function: Callable[..., Any], inputs: Inputs, **options: Any) -> Results:
        inputs = with_leaves(inputs, ("hidden",))
        divergence = function(**inputs, divergence="jsd", **options).divergence
        return {"divergence": divergence.detach()} | gradients(divergence.sum(), inputs)

    exact, naive = (run(reference.token_stats, cast(call, x)) for x in (torch.float64, torch.float32))
    # A log-sum-exp in fp32 is off by 2^-18 and more: probabilities that were not corrected for it would be, too.
    for name, actual in run(token_stats, call, backend="triton").items():
        assert largest(actual - exact[name]) <= 2 * largest(naive[name] - exact[name]) + 2**-23


@pytest.mark.parametrize("mode", DISTILLATION_MODES)
def test_words_that_the_bias_bans(mode: str) -> None:
    config = SRPOConfig(distillation_mode=mode, topk=3, dw_beta=0.5)
    inputs = loss_inputs(0, (4, 6), 8, 129, config=config)
    allowed = torch.ones(129, dtype=torch.bool)
    allowed[40:100] = False
    inputs["target_ids"] %= 40
    banned = inputs | {"bias": inputs["bias"].masked_fill(~allowed, -math.inf)}
    without = inputs | {"weight": inputs["weight"][allowed], "bias": inputs["bias"][allowed]}
    actual = run_loss(srpo_loss, cast(banned, torch.float32), config=config, backend="triton")
    expected = run_loss(reference.srpo_loss, without, config=config)
    for name in ("grad weight", "grad bias"):
        assert not actual[name][~allowed].any()
        actual[name] = actual[name][allowed]
    assert_same(actual, expected, 1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_rows_are_counted(bad: float) -> None:
    inputs = cast(loss_inputs(0, (6, 7)) | {"mask": None}, torch.float32)
    inputs["sdpo_mask"] = torch.tensor([True, True, False, False, False, False])
    inputs["advantages"] = torch.ones(6)
    inputs["hidden"][0, 1] = inputs["hidden"][3, 2:4] = bad
    assert srpo_loss(**inputs, backend="triton").metrics["nonfinite_rows"] == 3


def worst(sign: float) -> Callable[[np.ndarray], np.ndarray]:
    """The base-2 logarithm with the largest error that NVIDIA's has."""

    def log2(x: np.ndarray) -> np.ndarray:
        exact = np.log2(x.astype(np.float64))
        bound = 2.0**-22 * np.where((x >= 0.5) & (x <= 2.0), 1.0, np.abs(exact))
        noise = np.random.default_rng(0).uniform(-1.0, 1.0, x.shape) if sign == 0 else sign
        return (exact + noise * bound).astype(x.dtype)

    return log2


@pytest.mark.interpreter
@pytest.mark.parametrize("sign", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_the_error_of_the_hardware_logarithm_is_below_the_rounding_of_logits(
    spread: float, sign: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def create_log2(builder: Any, x: Any) -> Any:
        calls.append(x)
        return builder.unary_op(x, worst(sign))

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_log2", create_log2)
    config = SRPOConfig(divergence="jsd", temperature=0.5)
    inputs = loss_inputs(0, (4, 6), 16, 257, spread=spread, config=config) | {
        "sdpo_mask": torch.ones(4, dtype=torch.bool)
    }
    check_loss(Case(inputs, {"config": config}), torch.float32, "triton")
    assert calls


@pytest.mark.interpreter
@pytest.mark.parametrize("divergence", MIXTURE_DIVERGENCES)
@pytest.mark.parametrize("regime", ["flat", "peaked", "saturated"])
def test_what_the_hardware_logarithm_adds_to_a_divergence(
    regime: str, divergence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_ROW_LANES", 1024)
    monkeypatch.setattr(test_accuracy, "vendor_of", lambda device: "nvidia")
    z, y, _ = test_accuracy.logits(regime)
    inputs, stats = test_accuracy.heads(z, y), {"divergence": divergence, "alpha": 0.3}
    own, log2 = token_stats(**inputs, **stats, backend="triton").divergence, worst(1.0)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_log2", lambda builder, x: builder.unary_op(x, log2))
    off = token_stats(**inputs, **stats, backend="triton").divergence
    assert own is not None and off is not None
    allowed = test_accuracy.of_logarithms(inputs, stats, torch.device("cpu"))
    # All of it, where every logarithm is too large by as much as it may be, up to roundings of both results.
    assert abs(test_accuracy.rms(off - own) - allowed) <= 0.02 * allowed + 2.0**-23 * test_accuracy.rms(own)


def triton(inputs: Inputs, config: SRPOConfig) -> Results:
    return run_loss(srpo_loss, inputs, config=config, backend="triton")


def test_run_to_run() -> None:
    inputs = cast(loss_inputs(0, (6, 5), 16, 257), torch.bfloat16)
    assert_same(triton(inputs, SRPOConfig()), triton(inputs, SRPOConfig()), 0.0)
