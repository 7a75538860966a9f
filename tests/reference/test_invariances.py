"""What may not change the loss or the gradients: masked and idle rows, layout, micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import reference
from reference import distillation
from reference.policy import ALWAYS_ACTIVE_LOSSES
from srpo_kernels.losses.options import LOSS_TYPES

Make = Callable[..., Any]
REDUCTIONS = ("token", "sequence", "constant", "token_sum", "sequence_sum")


@pytest.mark.parametrize("mode", ["full", "topk", "sampled"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_masked_rows_are_never_read(config: Make, batch: Make, grads: Make, loss_type: str, mode: str) -> None:
    options = config(loss_type=loss_type, distillation_mode=mode, topk=3, kl_coef=0.1, entropy_coef=0.1)
    inputs = batch()
    output = reference.srpo_loss(**inputs, config=options)
    clean = inputs | {"target_ids": inputs["target_ids"].clamp(min=0)}
    clean["hidden"] = inputs["hidden"].detach().nan_to_num(0).requires_grad_()
    clean["teacher_hidden"] = inputs["teacher_hidden"].nan_to_num(0, 0, 0)
    expected = reference.srpo_loss(**clean, config=options)
    assert torch.isfinite(output.loss)
    assert torch.equal(output.loss, expected.loss)
    for grad, expected_grad in zip(grads(output.loss, inputs), grads(expected.loss, clean), strict=True):
        assert torch.equal(grad, expected_grad)
    assert (output.log_probs[~inputs["mask"]] == 0).all()
    assert output.metrics["nonfinite_rows"] == 0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("nothing", ["masked", "zero advantages", "no rows"])
def test_nothing_active_is_a_zero_loss_attached_to_the_graph(
    config: Make, batch: Make, packed: Make, grads: Make, nothing: str, loss_type: str
) -> None:
    inputs = batch() | {"sdpo_mask": None, "teacher_hidden": None}
    if nothing == "masked":
        inputs["mask"] = torch.zeros_like(inputs["mask"])
    elif nothing == "zero advantages":
        inputs["advantages"] = None
    else:
        inputs = packed(batch())
        inputs = {
            k: v if k in ("weight", "bias") else v[:0].detach().requires_grad_(k == "hidden") for k, v in inputs.items()
        }
    if nothing == "zero advantages" and loss_type in ALWAYS_ACTIVE_LOSSES:
        # Without old log-probs their penalties are 0.
        inputs["old_log_probs"] = None
    for reduction in REDUCTIONS:
        output = reference.srpo_loss(**inputs, config=config(loss_type=loss_type, reduction=reduction))
        assert output.loss.item() == 0
        for grad in grads(output.loss, inputs):
            assert (grad == 0).all()
        assert all(value.isfinite() for value in output.metrics.values())


@pytest.mark.parametrize("loss_type", sorted(set(LOSS_TYPES) - set(ALWAYS_ACTIVE_LOSSES)))
def test_counting_inactive_rows_changes_their_log_probs_alone(
    config: Make, batch: Make, grads: Make, loss_type: str
) -> None:
    inputs = batch()
    output = reference.srpo_loss(**inputs, config=config(loss_type=loss_type))
    counted = reference.srpo_loss(**inputs, config=config(loss_type=loss_type, count_inactive=True))
    assert torch.equal(output.loss, counted.loss)
    for grad, expected in zip(grads(counted.loss, inputs), grads(output.loss, inputs), strict=True):
        assert torch.equal(grad, expected)
    idle = inputs["mask"] & (inputs["advantages"] == 0)[:, None]
    assert (output.log_probs[idle] == 0).all()
    assert (counted.log_probs[idle] < 0).all()
    assert torch.equal(output.log_probs[~idle], counted.log_probs[~idle])
    scored = counted.metrics["scored_policy_tokens"] - output.metrics["scored_policy_tokens"]
    assert scored == idle.sum()


def test_one_nonzero_advantage_makes_a_gspo_sequence_active(config: Make, batch: Make) -> None:
    inputs = batch() | {"sdpo_mask": None}
    advantages = torch.zeros(inputs["mask"].shape, dtype=torch.float64)
    advantages[3, 0] = 1
    inputs["advantages"] = advantages
    length = inputs["mask"][3].sum()
    assert reference.srpo_loss(**inputs, config=config(loss_type="gspo")).metrics["active_rows"] == length
    assert reference.srpo_loss(**inputs, config=config()).metrics["active_rows"] == 1


@pytest.mark.parametrize("term", ["kl_coef", "entropy_coef"])
def test_kl_and_entropy_terms_make_every_policy_row_active(config: Make, batch: Make, term: str) -> None:
    inputs = batch()
    metrics = reference.srpo_loss(**inputs, config=config(**{term: 0.1})).metrics
    assert metrics["active_rows"] == inputs["mask"].sum()
    assert metrics["scored_policy_tokens"] == metrics["policy_tokens"]
    assert metrics["entropy_tokens"] == (metrics["policy_tokens"] if term == "entropy_coef" else 0)


def test_only_the_student_gets_a_gradient(config: Make, batch: Make) -> None:
    inputs = batch()
    constants = ("advantages", "teacher_hidden", "old_log_probs", "ref_log_probs", "is_weights")
    for name in constants:
        inputs[name] = inputs[name].requires_grad_()
    loss = reference.srpo_loss(**inputs, config=config(kl_coef=0.1)).loss
    found = torch.autograd.grad(loss, [inputs[name] for name in constants], allow_unused=True)
    assert dict(zip(constants, found, strict=True)) == dict.fromkeys(constants)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_packed_rows_are_the_padded_batch(
    config: Make, batch: Make, packed: Make, grads: Make, loss_type: str, reduction: str
) -> None:
    inputs = batch()
    # A sequence without a valid token is not among the packed rows.
    inputs["mask"][4] = False
    options = config(loss_type=loss_type, reduction=reduction, kl_coef=0.1)
    padded = reference.srpo_loss(**inputs, config=options)
    rows = packed(inputs)
    output = reference.srpo_loss(**rows, config=options)
    torch.testing.assert_close(output.loss, padded.loss)
    torch.testing.assert_close(output.metrics, padded.metrics)
    for grad, expected in zip(grads(output.loss, inputs), grads(padded.loss, inputs), strict=True):
        torch.testing.assert_close(grad, expected)
    only_routed = rows | {"teacher_hidden": rows["teacher_hidden"][rows["sdpo_mask"]]}
    assert torch.equal(reference.srpo_loss(**only_routed, config=options).loss, output.loss)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_micro_batches_with_global_normalizers_sum_to_the_whole_batch(
    config: Make, batch: Make, grads: Make, reduction: str
) -> None:
    inputs, options = batch(), config(reduction=reduction)
    whole = reference.srpo_loss(**inputs, config=options)
    sdpo = inputs["mask"] & inputs["sdpo_mask"][:, None]
    row_inputs = ("hidden", "weight", "target_ids", "mask", "bias", "teacher_hidden")
    stats = reference.token_stats(**{name: inputs[name] for name in row_inputs})
    assert stats.teacher_entropy is not None
    normalizers = SimpleNamespace(
        token_count=inputs["mask"].sum(),
        dw_log_mean=distillation.weight_log_mean(stats.teacher_entropy[sdpo], options.dw_beta),
        sequence_count=inputs["mask"].any(1).sum(),
    )
    loss = torch.zeros((), dtype=torch.float64)
    for rows in (slice(0, 1), slice(1, 5), slice(5, 6)):
        part = {name: value if name in ("weight", "bias") else value[rows] for name, value in inputs.items()}
        loss = loss + reference.srpo_loss(**part, normalizers=normalizers, config=options).loss
    torch.testing.assert_close(loss, whole.loss)
    for grad, expected in zip(grads(loss, inputs), grads(whole.loss, inputs), strict=True):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("route_tokens", [False, True])
def test_the_teacher_may_come_for_the_routed_sequences_alone(config: Make, batch: Make, route_tokens: bool) -> None:
    inputs = batch()
    if route_tokens:
        every_other_token = torch.arange(inputs["mask"].shape[1]) % 2 == 0
        inputs["sdpo_mask"] = inputs["sdpo_mask"][:, None] & every_other_token
    routed = inputs["sdpo_mask"].any(dim=1) if route_tokens else inputs["sdpo_mask"]
    expected = reference.srpo_loss(**inputs, config=config())
    inputs["teacher_hidden"] = inputs["teacher_hidden"][routed]
    output = reference.srpo_loss(**inputs, config=config())
    assert torch.equal(output.loss, expected.loss)
    assert output.metrics["sdpo_tokens"] > 0


def test_a_teacher_head_of_another_width(config: Make, batch: Make) -> None:
    inputs = batch()
    zeros = torch.zeros(2, dtype=torch.float64)
    wider = inputs | {
        "teacher_hidden": torch.cat([inputs["teacher_hidden"], zeros.expand(6, 5, 2)], dim=-1),
        "teacher_weight": torch.cat([inputs["weight"], zeros.expand(11, 2)], dim=-1),
        "teacher_bias": inputs["bias"],
    }
    expected, output = (reference.srpo_loss(**given, config=config()) for given in (inputs, wider))
    torch.testing.assert_close(output.loss, expected.loss)
    without_bias = reference.srpo_loss(**wider | {"teacher_bias": None}, config=config())
    assert not torch.isclose(without_bias.loss, expected.loss)
