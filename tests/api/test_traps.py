"""What other implementations get wrong, in the order of design section 3.

Point 9, what rows cost, is in ``test_costs``; point 11, the invariances, in ``test_invariance``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

import reference
from srpo_kernels import SRPOConfig, srpo_loss, teacher_stats, token_stats
from srpo_kernels.engine import workspace
from srpo_kernels.losses.options import DISTILLATION_MODES
from tests.comparison import assert_as_accurate, assert_same, largest, run_loss, with_leaves
from tests.inputs import LEAVES, Inputs, cast, for_backend, head_inputs, loss_inputs, workspace_floor
from tests.strategies import each_backend


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


# 1. Logits stay fp32.


@each_backend
def test_log_probs_of_bf16_inputs_are_those_of_fp32_logits(backend: str) -> None:
    inputs = cast(head_inputs(0, (64,), 64, 1009, spread=4.0), torch.bfloat16) | {"bias": None, "mask": None}
    exact = reference.token_stats(**cast(inputs, torch.float64)).log_probs
    bf16_logits = (inputs["hidden"] @ inputs["weight"].t()).float()
    rounded = log_softmax(bf16_logits, 1).gather(1, inputs["target_ids"][:, None]).squeeze(1)
    assert largest(rounded - exact) > 0.01
    assert largest(token_stats(**inputs, backend=backend).log_probs - exact) < 2e-5
    policy = inputs | {"teacher_hidden": None, "advantages": torch.ones(64)}
    loss_log_probs = srpo_loss(**policy, backend=backend).log_probs
    assert largest(loss_log_probs - exact) < 2e-5


@each_backend
def test_divergence_gradients_of_bf16_inputs_are_those_of_fp32_logits(backend: str) -> None:
    inputs = head_inputs(0, (64,), 64, 1009, spread=4.0)
    # A teacher like the student makes a small divergence of large logits.
    inputs["teacher_hidden"] = inputs["hidden"] + 0.1 * inputs["teacher_hidden"]
    inputs = cast(inputs, torch.bfloat16) | {"bias": None, "mask": None}

    def gradient(divergence: Tensor, hidden: Tensor) -> Tensor:
        return torch.autograd.grad(divergence.sum(), hidden)[0]

    exact_inputs = with_leaves(cast(inputs, torch.float64), ("hidden",))
    exact = gradient(reference.token_stats(**exact_inputs).divergence, exact_inputs["hidden"])
    ours = with_leaves(inputs, ("hidden",))
    actual = gradient(token_stats(**ours, backend=backend).divergence, ours["hidden"])
    naive = with_leaves(inputs, ("hidden",))
    log_p, log_q = (
        log_softmax((x @ inputs["weight"].t()).float(), 1) for x in (naive["hidden"], inputs["teacher_hidden"])
    )
    rounded = gradient(reference.distillation.jsd(log_p, log_q.detach(), 0.5), naive["hidden"])
    assert relative_error(rounded, exact) > 0.02
    assert relative_error(actual, exact) < 0.003


# 2. dW accumulates in fp32.


def test_the_weight_gradient_of_many_chunks_is_rounded_once() -> None:
    config = SRPOConfig(loss_type="reinforce")
    inputs = loss_inputs(0, (256,), 8, 33, config=config)
    inputs = cast(inputs | {"sdpo_mask": None, "teacher_hidden": None}, torch.bfloat16)
    exact = run_loss(reference.srpo_loss, cast(inputs, torch.float64), config=config)["grad weight"]
    row_by_row = workspace_floor(33, 4, 1)
    actual = run_loss(srpo_loss, inputs, config=config, workspace_bytes=row_by_row)["grad weight"]
    assert relative_error(actual, exact) < 1.01 * relative_error(exact.bfloat16(), exact)


# 3. Detached: teacher, entropy, weights, kappa, is_weights, and old_log_probs when None.


def test_nothing_but_hidden_weight_and_bias_gets_a_gradient() -> None:
    inputs = with_leaves(loss_inputs(0, (6, 7), teacher_size=5))
    others = [x for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point()]
    for x in others:
        x.requires_grad_()
    srpo_loss(**inputs, config=SRPOConfig(kl_coef=0.1)).loss.backward()
    assert {name for name, x in inputs.items() if isinstance(x, Tensor) and x.grad is not None} == set(LEAVES)


@pytest.mark.parametrize("mode", DISTILLATION_MODES)
def test_a_teacher_that_shares_the_head_sends_no_gradient_through_it(mode: str) -> None:
    config = SRPOConfig(distillation_mode=mode, dw_beta=2.0)
    inputs = loss_inputs(0, (6, 7))
    apart = inputs | {"teacher_weight": inputs["weight"].clone(), "teacher_bias": inputs["bias"].clone()}
    assert_same(run_loss(srpo_loss, inputs, config=config), run_loss(srpo_loss, apart, config=config), 0.0)


def test_without_old_log_probs_the_ratio_is_1_and_its_gradient_survives() -> None:
    inputs = loss_inputs(0, (6, 7)) | {"sdpo_mask": None, "teacher_hidden": None, "old_log_probs": None}
    ratio, log_prob = (run_loss(srpo_loss, inputs, config=SRPOConfig(loss_type=name)) for name in ("grpo", "reinforce"))
    for name in LEAVES:
        torch.testing.assert_close(ratio[f"grad {name}"], log_prob[f"grad {name}"])
    assert largest(ratio["grad weight"]) > 0


# 4. Masked rows are never read; every output row is written.

PER_TOKEN = ("hidden", "teacher_hidden", "advantages", "old_log_probs", "ref_log_probs", "is_weights")


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("loss_type", ["grpo", "gspo"])
@each_backend
def test_masked_rows_are_never_read(loss_type: str, poison: float, backend: str) -> None:
    config = SRPOConfig(loss_type=loss_type, kl_coef=0.1, entropy_coef=0.1)
    inputs = for_backend(loss_inputs(0, (6, 7), config=config), backend)
    inputs["advantages"] = inputs["advantages"][:, None].repeat(1, 7)
    expected = run_loss(srpo_loss, inputs, config=config, backend=backend)
    masked = ~inputs["mask"]
    for name in PER_TOKEN:
        inputs[name][masked] = poison
    inputs["target_ids"][masked] = -100
    actual = run_loss(srpo_loss, inputs, config=config, backend=backend)
    assert_same(actual, expected, 0.0)
    assert not actual["grad hidden"][masked].any()
    assert not actual["log_probs"][masked].any()


@each_backend
def test_the_teacher_is_never_read_where_the_policy_learns(backend: str) -> None:
    inputs = for_backend(loss_inputs(0, (6, 7)), backend)
    expected = run_loss(srpo_loss, inputs, backend=backend)
    inputs["teacher_hidden"][~inputs["sdpo_mask"]] = torch.nan
    inputs["advantages"][inputs["sdpo_mask"]] = torch.nan
    assert_same(run_loss(srpo_loss, inputs, backend=backend), expected, 0.0)


@pytest.fixture
def poisoned_allocations() -> Iterator[None]:
    """What ``torch.empty`` returns is filled with NaN or the largest integer."""
    workspace.release()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize("mode", DISTILLATION_MODES)
@each_backend
def test_every_output_row_is_written(mode: str, backend: str) -> None:
    config = SRPOConfig(distillation_mode=mode, entropy_coef=0.1)
    inputs = for_backend(loss_inputs(0, (6, 7)), backend)
    assert torch.empty(1).isnan()
    results = run_loss(srpo_loss, inputs, config=config, backend=backend)
    assert all(x.isfinite().all() for x in results.values())


@each_backend
def test_a_call_that_went_to_nan_leaves_nothing_to_the_next(backend: str) -> None:
    inputs = for_backend(loss_inputs(0, (6, 7)), backend)
    expected = run_loss(srpo_loss, inputs, backend=backend)
    broken = inputs | {"hidden": torch.full_like(inputs["hidden"], torch.nan)}
    assert run_loss(srpo_loss, broken, backend=backend)["loss"].isnan()
    assert_same(run_loss(srpo_loss, inputs, backend=backend), expected, 0.0)


# 5. No active row: a zero loss attached to the graph.


def nothing_valid(inputs: Inputs) -> None:
    inputs["mask"] = torch.zeros_like(inputs["mask"])


def nothing_to_learn(inputs: Inputs) -> None:
    inputs |= {"advantages": torch.zeros_like(inputs["advantages"]), "sdpo_mask": None, "teacher_hidden": None}


@pytest.mark.parametrize("rows", [(6, 7), (17,)], ids=["padded", "packed"])
@pytest.mark.parametrize("options", [{}, {"loss_type": "gspo"}, {"reduction": "sequence"}], ids=str)
@pytest.mark.parametrize("empty", [nothing_valid, nothing_to_learn])
@each_backend
def test_no_active_row_gives_a_zero_loss_on_the_graph(
    empty: Any, options: dict[str, str], rows: tuple[int, ...], backend: str
) -> None:
    inputs = for_backend(loss_inputs(0, rows), backend)
    empty(inputs)
    inputs = with_leaves(inputs)
    out = srpo_loss(**inputs, config=SRPOConfig(**options), backend=backend)
    out.loss.backward()
    assert out.loss == 0.0
    assert all(not inputs[name].grad.any() for name in LEAVES)
    assert all(x.isfinite() for x in out.metrics.values())
    assert out.metrics["active_rows"] == 0


@each_backend
def test_a_batch_of_no_sequence_gives_a_zero_loss_on_the_graph(backend: str) -> None:
    inputs = with_leaves(for_backend(loss_inputs(0, (0, 7)), backend))
    out = srpo_loss(**inputs, backend=backend)
    out.loss.backward()
    assert out.loss == 0.0
    assert not inputs["weight"].grad.any()


# 6. The tail of the vocabulary does not count as logits of 0.


@pytest.mark.parametrize("vocab_size", [1, 2, 127, 129, 1009])
@pytest.mark.parametrize("mode", DISTILLATION_MODES)
@each_backend
def test_logits_far_below_zero_change_nothing(mode: str, vocab_size: int, backend: str) -> None:
    config = SRPOConfig(distillation_mode=mode, topk=3)
    inputs = for_backend(loss_inputs(0, (6, 7), vocab_size=vocab_size, teacher_size=5), backend)
    lower = inputs | {name: inputs[name] - 1000.0 for name in ("bias", "teacher_bias")}
    expected = run_loss(srpo_loss, inputs, config=config, backend=backend)
    actual = run_loss(srpo_loss, lower, config=config, backend=backend)
    if backend == "torch":
        return assert_same(actual, expected, 1e-9)
    # In fp32, logits of 1000 lose 9 bits.
    return assert_as_accurate(actual, expected, expected, condition=2.0**9)


# 7. Row offsets beyond 2^31 elements.


def test_rows_beyond_the_reach_of_int32_are_read_at_their_place() -> None:
    inputs = loss_inputs(0, (3,), 8, 33, teacher_size=8) | {"mask": None}
    expected = run_loss(srpo_loss, inputs, leaves=("weight",))
    distant = dict(inputs)
    for name in ("hidden", "teacher_hidden"):
        # Pages that are never touched are never there: only three rows of these 18 GB are.
        apart = 2**30 + 8
        distant[name] = torch.empty(2 * apart + 8, dtype=torch.float64).as_strided((3, 8), (apart, 1))
        distant[name].copy_(inputs[name])
    assert_same(run_loss(srpo_loss, distant, leaves=("weight",)), expected, 0.0)


def test_int32_ids_are_widened_before_they_are_multiplied() -> None:
    inputs = loss_inputs(0, (17,)) | {"sequence_ids": torch.tensor([2**31 - 1, -(2**31)]).repeat(9)[:17]}
    config = SRPOConfig(loss_type="gspo", reduction="sequence")
    narrow = inputs | {name: inputs[name].int() for name in ("target_ids", "sequence_ids")}
    assert_same(run_loss(srpo_loss, narrow, config=config), run_loss(srpo_loss, inputs, config=config), 0.0)


# 8. The upstream gradient.


@pytest.mark.parametrize("factor", [1.0, -2.5, 0.0, 65536.0])
@each_backend
def test_the_upstream_gradient_multiplies_the_gradients(factor: float, backend: str) -> None:
    inputs = for_backend(loss_inputs(0, (6, 7)), backend)
    plain, scaled = with_leaves(inputs), with_leaves(inputs)
    srpo_loss(**plain, backend=backend).loss.backward()
    (srpo_loss(**scaled, backend=backend).loss * factor).backward()
    for name in LEAVES:
        torch.testing.assert_close(scaled[name].grad, plain[name].grad * factor)


def test_an_upstream_gradient_that_is_no_scalar_is_refused() -> None:
    loss = srpo_loss(**with_leaves(loss_inputs(0, (6, 7)))).loss
    with pytest.raises(RuntimeError, match="shape"):
        loss.backward(torch.ones(2, dtype=loss.dtype))


# 10. What is not supported raises.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "cuda"}, ValueError, "backend must be one of .* got 'cuda'"),
        ({"vocab_parallel_group": "data"}, TypeError, "vocab_parallel_group must be .* got str"),
    ],
    ids=str,
)
def test_an_unsupported_option_raises(options: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = head_inputs(0, (4,), 8, 33)
    with pytest.raises(error, match=message):
        srpo_loss(**inputs, **options)
    with pytest.raises(error, match=message):
        token_stats(**inputs, **options)
    with pytest.raises(error, match=message):
        teacher_stats(inputs["hidden"], inputs["weight"], **options)
