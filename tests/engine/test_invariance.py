"""The same batch in other pieces, orders and forms gives the same loss and gradients: design section 3, point 11."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import reference
from srpo_kernels import Normalizers, SRPOConfig, srpo_loss, teacher_stats
from srpo_kernels.verify.rounding import GradientTerms
from tests.comparison import Results, assert_invariant, assert_same, gradients, largest, run_loss, with_leaves
from tests.inputs import (
    LEAVES,
    SHARED,
    Inputs,
    cast,
    for_backend,
    loss_inputs,
    policy_rows,
    take,
    teacher_transform_of,
    workspace_floor,
)
from tests.strategies import configs, each_backend, given_each_backend


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """33 words are two of Triton's blocks and a tail for two models, and one for one."""
    monkeypatch.setattr("srpo_kernels.kernels.launch._ROW_LANES", 8)


def batch(seed: int, config: SRPOConfig, rows: tuple[int, ...] = (6, 5)) -> Inputs:
    """A batch whose sequences have a valid token each, so that padded and packed rows count alike."""
    inputs = loss_inputs(seed, rows, teacher_size=5, config=config)
    if len(rows) == 2:
        inputs["mask"][:, 0] = True
    return inputs


def trim(inputs: Inputs) -> Inputs:
    """A padded batch cut to its longest sequence."""
    length = int(inputs["mask"].any(0).nonzero().max()) + 1
    return {
        name: x[:, :length] if isinstance(x, Tensor) and x.ndim > 1 and name not in SHARED else x
        for name, x in inputs.items()
    }


def pack(inputs: Inputs) -> Inputs:
    """The rows of a padded batch, one after the other."""
    count, length = inputs["target_ids"].shape

    def flatten(name: str, x: Tensor) -> Tensor:
        if name in SHARED:
            return x
        return x.repeat_interleave(length, 0) if x.shape == (count,) else x.flatten(0, 1)

    packed = {name: x if x is None else flatten(name, x) for name, x in inputs.items()}
    return packed | {"sequence_ids": torch.arange(count).repeat_interleave(length)}


def normalizers_of(inputs: Inputs, config: SRPOConfig, backend: str = "torch") -> Normalizers:
    teacher = {name: inputs[name] for name in ("teacher_hidden", "teacher_weight", "teacher_bias", "mask")}
    entropy = teacher_stats(**teacher, **teacher_transform_of(config), backend=backend).entropy
    ids = inputs.get("sequence_ids")
    return Normalizers.from_batch(inputs["mask"], inputs["sdpo_mask"], entropy, config.dw_beta, ids)


def accumulate(inputs: Inputs, parts: list[Inputs], config: SRPOConfig, backend: str) -> tuple[Results, Results]:
    """Loss, metrics and gradients of micro-batches of ``inputs``, added up by autograd; and their metrics."""
    first, *others = [normalizers_of(part, config, backend) for part in parts]
    normalizers = first.merge(*others)
    total, metrics = inputs["weight"].new_zeros(()), {}
    for part in parts:
        out = srpo_loss(**part, config=config, normalizers=normalizers, backend=backend)
        total = total + out.loss
        metrics = {name: metrics.get(name, 0) + value for name, value in out.metrics.items()}
    return {"loss": total.detach()} | gradients(total, inputs), metrics


def relative(results: Results, expected: Results) -> dict[str, float]:
    return {
        name: float((results[name].double() - x.double()).norm() / x.double().norm().clamp_min(1e-30))
        for name, x in expected.items()
        if x.any()
    }


def of_other_sums(inputs: Inputs, config: SRPOConfig) -> dict[str, float]:
    """How far fp32 gradients may be apart where a device takes another product for another number of rows.

    A sum rounds each of its terms once for each of them at most, and a dlogit has the roundings of its logit, which is
    a sum over hidden states. Both results have that error.
    """
    terms = GradientTerms()
    run_loss(reference.srpo_loss, cast(inputs, torch.float64), config=config, project=terms)
    vocab_size, width = inputs["weight"].shape
    roundings = max(inputs["target_ids"].numel(), vocab_size) + width
    return {name: 2 * roundings * 2.0**-24 * size for name, size in terms.largest().items()}


# Weights under a dw_beta of 30 differ by more than their own rounding.
splittable = configs(whole_batch=False).map(lambda config: replace(config, dw_beta=min(config.dw_beta, 1.0)))


@given_each_backend(
    thorough=True,
    config=splittable,
    seed=st.integers(0, 2**31),
    homes=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    reverse=st.booleans(),
    packed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_unequal_micro_batches_add_up_to_the_batch(
    config: SRPOConfig,
    seed: int,
    homes: list[int],
    reverse: bool,
    packed: bool,
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
) -> None:
    dtype = torch.float32 if backend == "triton" else dtype
    inputs = with_leaves(cast(batch(seed, config), dtype))
    whole = pack(inputs) if packed else inputs
    expected = srpo_loss(**whole, config=config, backend=backend)
    of_sequence = torch.tensor(homes)
    of_entry = of_sequence.repeat_interleave(5) if packed else of_sequence
    parts = [take(whole, (of_entry == home).nonzero().squeeze(1)) for home in sorted(set(homes), reverse=reverse)]
    if not packed:
        parts = [trim(part) for part in parts]
    results, metrics = accumulate(inputs, parts, config, backend)
    wanted = {"loss": expected.loss.detach()} | gradients(expected.loss, inputs)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    if device.type == "cpu":
        errors = relative(results, wanted)
        assert all(error <= tolerance for name, error in errors.items() if name != "loss"), errors
    else:
        for name, allowed in of_other_sums(inputs, config).items():
            assert largest(results[name] - wanted[name]) <= allowed, name
    torch.testing.assert_close(results["loss"], wanted["loss"], rtol=tolerance, atol=tolerance)
    for name, value in expected.metrics.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-5, atol=1e-5)


def test_the_mean_of_micro_batch_losses_is_not_the_loss_of_the_batch() -> None:
    # What the test above would miss if all micro-batches had the same tokens, losses and teacher entropies.
    config = SRPOConfig()
    inputs = batch(0, config)
    parts = [take(inputs, torch.tensor(index)) for index in ([0, 1, 2, 3], [4, 5])]
    mean = sum(srpo_loss(**part, config=config).loss for part in parts) / 2
    assert abs(float(mean / srpo_loss(**inputs, config=config).loss) - 1) > 0.01


@given_each_backend(config=configs(), seed=st.integers(0, 2**31), order=st.permutations(range(6)))
def test_the_order_of_sequences(config: SRPOConfig, seed: int, order: list[int], backend: str) -> None:
    inputs = for_backend(batch(seed, config), backend)
    index = torch.tensor(order)
    expected = run_loss(srpo_loss, inputs, config=config, backend=backend)
    expected |= {name: expected[name][index] for name in ("log_probs", "grad hidden")}
    assert_invariant(run_loss(srpo_loss, take(inputs, index), config=config, backend=backend), expected, config)


@given_each_backend(config=configs(), seed=st.integers(0, 2**31), order=st.permutations(range(23)))
def test_the_order_of_packed_rows(config: SRPOConfig, seed: int, order: list[int], backend: str) -> None:
    inputs = for_backend(batch(seed, config, (23,)), backend)
    index = torch.tensor(order)
    expected = run_loss(srpo_loss, inputs, config=config, backend=backend)
    expected |= {name: expected[name][index] for name in ("log_probs", "grad hidden")}
    assert_invariant(run_loss(srpo_loss, take(inputs, index), config=config, backend=backend), expected, config)


@given_each_backend(config=configs(), seed=st.integers(0, 2**31), times=st.integers(1, 40))
def test_the_size_of_chunks(config: SRPOConfig, seed: int, times: int, backend: str) -> None:
    inputs = for_backend(batch(seed, config), backend)
    expected = run_loss(srpo_loss, inputs, config=config, backend=backend)
    floor = workspace_floor(33, inputs["hidden"].itemsize, 2, backend)
    workspace_bytes = times * floor // 2 + floor // 2
    actual = run_loss(srpo_loss, inputs, config=config, backend=backend, workspace_bytes=workspace_bytes)
    assert_invariant(actual, expected, config)


@given_each_backend(config=configs(), seed=st.integers(0, 2**31))
def test_padded_and_packed_rows(config: SRPOConfig, seed: int, backend: str) -> None:
    inputs = for_backend(batch(seed, config), backend)
    expected = run_loss(srpo_loss, inputs, config=config, backend=backend)
    expected |= {name: expected[name].flatten(0, 1) for name in ("log_probs", "grad hidden")}
    assert_invariant(run_loss(srpo_loss, pack(inputs), config=config, backend=backend), expected, config)


@given_each_backend(config=configs(), seed=st.integers(0, 2**31), by_token=st.booleans(), packed=st.booleans())
def test_a_teacher_for_all_rows_or_for_the_routed_ones(
    config: SRPOConfig, seed: int, by_token: bool, packed: bool, backend: str
) -> None:
    inputs = for_backend(batch(seed, config, (23,) if packed else (6, 5)), backend)
    if by_token and not packed:
        inputs["sdpo_mask"] = torch.rand((6, 5), generator=torch.Generator().manual_seed(seed)) < 0.3
    routed = inputs["sdpo_mask"] if inputs["sdpo_mask"].ndim == 1 else inputs["sdpo_mask"].any(1)
    alone = inputs | {"teacher_hidden": inputs["teacher_hidden"][routed]}
    expected = run_loss(srpo_loss, inputs, config=config, backend=backend)
    assert_same(run_loss(srpo_loss, alone, config=config, backend=backend), expected, 0.0)


@given_each_backend(config=configs(), seed=st.integers(0, 2**31))
def test_counting_inactive_tokens_changes_only_what_a_log_shows(config: SRPOConfig, seed: int, backend: str) -> None:
    inputs = for_backend(batch(seed, config), backend)
    without, counted = (
        run_loss(srpo_loss, inputs, config=replace(config, count_inactive=value), backend=backend)
        for value in (False, True)
    )
    scored = ("log_probs", "metric scored_policy", "metric approx_kl", "metric ref_kl", "metric rollout")
    scored += ("metric entropy",) if config.count_entropy else ()
    assert_same(*({k: v for k, v in x.items() if not k.startswith(scored)} for x in (counted, without)), 0.0)
    assert counted["metric scored_policy_tokens"] == policy_rows(inputs).sum()
    computed = without["log_probs"] != 0
    torch.testing.assert_close(counted["log_probs"][computed], without["log_probs"][computed], rtol=0, atol=0)


@given_each_backend(config=configs(), seed=st.integers(0, 2**31))
def test_what_is_masked(config: SRPOConfig, seed: int, backend: str) -> None:
    inputs = for_backend(batch(seed, config), backend)
    expected = run_loss(srpo_loss, inputs, config=config, backend=backend)
    other, masked = for_backend(batch(seed + 1, config), backend), ~inputs["mask"]
    for name in ("hidden", "target_ids", "teacher_hidden", "old_log_probs", "ref_log_probs", "is_weights"):
        inputs[name][masked] = other[name][masked]
    assert_same(run_loss(srpo_loss, inputs, config=config, backend=backend), expected, 0.0)


@each_backend
@pytest.mark.parametrize("options", [{}, {"loss_type": "gspo"}, {"distillation_mode": "topk"}], ids=str)
def test_a_second_backward(options: dict[str, Any], backend: str) -> None:
    inputs = with_leaves(for_backend(batch(0, SRPOConfig()), backend))
    loss = srpo_loss(**inputs, config=SRPOConfig(**options), backend=backend).loss
    leaves = [inputs[name] for name in LEAVES]
    first = torch.autograd.grad(loss, leaves, 3 * torch.ones_like(loss), retain_graph=True)
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    third = torch.autograd.grad(loss, leaves, 3 * torch.ones_like(loss))
    torch.testing.assert_close(first, third, rtol=0, atol=0)
    torch.testing.assert_close(first, tuple(3 * x for x in second))


@given_each_backend(config=configs(), seed=st.integers(0, 2**31))
def test_without_gradients(config: SRPOConfig, seed: int, backend: str) -> None:
    inputs = with_leaves(for_backend(batch(seed, config), backend))
    expected = srpo_loss(**inputs, config=config, backend=backend)
    with torch.no_grad():
        actual = srpo_loss(**inputs, config=config, backend=backend)
    assert not actual.loss.requires_grad
    assert_same(
        actual.metrics | {"loss": actual.loss, "log_probs": actual.log_probs},
        expected.metrics | {"loss": expected.loss.detach(), "log_probs": expected.log_probs},
        1e-12,
    )
