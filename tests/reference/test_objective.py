from __future__ import annotations

from collections.abc import Callable
from math import exp, log
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from reference import distillation, gradients, logits, policy

Make = Callable[..., Any]


def test_the_objective_by_hand(config: Make) -> None:
    # One policy token, A = 2 and rho = 1.1, weighted 0.5; two distillation tokens, the teacher flat and
    # certain; one zero-advantage token, which counts in the denominator alone.
    p, q = [0.75, 0.25], [[0.5, 0.5], [1 - 1e-12, 1e-12]]
    hidden = torch.tensor(p, dtype=torch.float64).log().expand(4, 2)
    teacher_hidden = torch.tensor(q, dtype=torch.float64).log()
    output = reference.srpo_loss(
        hidden,
        torch.eye(2, dtype=torch.float64),
        torch.tensor([0, 1, 0, 1]),
        advantages=torch.tensor([2.0, 9.0, 9.0, 0.0]),
        sdpo_mask=torch.tensor([False, True, True, False]),
        teacher_hidden=teacher_hidden,
        old_log_probs=torch.tensor([0.75 / 1.1, 0.1, 0.5, 0.5], dtype=torch.float64).log(),
        is_weights=torch.tensor([0.5, 1.0, 1.0, 1.0]),
        config=config(divergence="forward_kl"),
    )
    flat = 2 * 0.5 / (1 + 0.5) * 2.0 * 0.5 * log(4 / 3)
    certain = 2 * 1.0 / (1 + 0.5) * 1.5 * log(4 / 3)
    assert output.loss.item() == pytest.approx((-2 * 1.1 * 0.5 + flat + certain) / 4)
    assert output.metrics["policy_loss_sum"].item() == pytest.approx(-1.1)
    assert output.metrics["sdpo_loss_sum"].item() == pytest.approx(flat + certain)
    assert output.metrics["divergence_sum"].item() == pytest.approx(1.5 * log(4 / 3))
    assert output.metrics["teacher_entropy_sum"].item() == pytest.approx(log(2))
    assert output.metrics["approx_kl_sum"].item() == pytest.approx(0.1 - log(1.1))
    counts = {"policy_tokens": 2, "sdpo_tokens": 2, "active_rows": 3, "scored_policy_tokens": 1}
    assert {name: output.metrics[name].item() for name in counts} == counts
    assert output.log_probs.exp().tolist() == pytest.approx([0.75, 0.25, 0.75, 1.0])


@pytest.mark.parametrize(("reduction", "expected"), [("token", 1), ("sequence", 1), ("constant", 5 / 14)])
def test_reductions_by_hand(config: Make, reduction: str, expected: float) -> None:
    # A fair coin under A = 1 loses log 2 per token; sequences of 4, 1 and 0 tokens, two that count, max_length 7.
    mask = torch.arange(4) < torch.tensor([[4], [1], [0]])
    output = reference.srpo_loss(
        torch.zeros(3, 4, 1),
        torch.zeros(2, 1),
        torch.zeros(3, 4, dtype=torch.long),
        advantages=torch.ones(3),
        mask=mask,
        config=config(loss_type="reinforce", reduction=reduction),
    )
    assert output.loss.item() == pytest.approx(expected * log(2))


def test_gspo_by_hand(config: Make) -> None:
    # Log-ratios 0.3 and -0.1 average to 0.1; the masked token's does not count.
    log_probs = torch.tensor([[0.5, 0.5, 0.9]], dtype=torch.float64).log()
    hidden = torch.stack([log_probs, (-log_probs.expm1()).log()], dim=-1)
    output = reference.srpo_loss(
        hidden,
        torch.eye(2, dtype=torch.float64),
        torch.zeros(1, 3, dtype=torch.long),
        advantages=torch.tensor([-3.0]),
        mask=torch.tensor([[True, True, False]]),
        old_log_probs=log_probs - torch.tensor([[0.3, -0.1, 5.0]]),
        config=config(loss_type="gspo"),
    )
    assert output.loss.item() == pytest.approx(3 * exp(0.1))


@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "gspo", "sapo", "reinforce"])
def test_without_old_log_probs_the_gradient_is_the_policy_gradient(
    config: Make, batch: Make, grads: Make, loss_type: str
) -> None:
    inputs = batch() | {"old_log_probs": None, "is_weights": None, "sdpo_mask": None}
    expected = grads(reference.srpo_loss(**inputs, config=config(loss_type="reinforce")).loss, inputs)
    output = reference.srpo_loss(**inputs, config=config(loss_type=loss_type))
    for grad, expected_grad in zip(grads(output.loss, inputs), expected, strict=True):
        torch.testing.assert_close(grad, expected_grad)
    assert output.metrics["approx_kl_sum"] == 0


@given(seed=st.integers(0, 2**16), vocabulary=st.sampled_from([1, 2, 129]))
def test_weights_average_to_one_over_the_distillation_tokens(
    config: Make, batch: Make, seed: int, vocabulary: int
) -> None:
    inputs = batch(seed, vocabulary=vocabulary)
    metrics = reference.srpo_loss(**inputs, config=config(dw_beta=3.0)).metrics
    torch.testing.assert_close(metrics["dw_weight_sum"], metrics["sdpo_tokens"])
    assert metrics["dw_weight_sq_sum"] >= metrics["sdpo_tokens"] - 1e-9
    assert metrics["policy_tokens"] + metrics["sdpo_tokens"] == inputs["mask"].sum()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_the_whole_gradient_in_closed_form(
    config: Make, batch: Make, packed: Make, grads: Make, divergence: str
) -> None:
    inputs = packed(batch())
    head = {"temperature": 0.8, "logit_scale": 1.5, "softcap": 4.0}
    options = config(divergence=divergence, alpha=0.3, kl_coef=0.2, entropy_coef=0.1, **head)
    output = reference.srpo_loss(**inputs, config=options)
    hidden, weight, bias = (inputs[name].detach() for name in ("hidden", "weight", "bias"))
    sdpo, ids = inputs["sdpo_mask"], inputs["target_ids"]
    x = hidden @ weight.T + bias
    z = logits.transform(x, **head)
    y = logits.transform(inputs["teacher_hidden"] @ weight.T + bias, **head)
    log_probs = logits.token_log_probs(z, ids)
    by_log_prob = gradients.clipped_loss_grad(
        (log_probs - inputs["old_log_probs"]).exp(), inputs["advantages"], 0.2, 0.28
    )
    by_log_prob = inputs["is_weights"] * by_log_prob
    by_log_prob += 0.2 * gradients.kl_estimate_grad(log_probs, inputs["ref_log_probs"], "k3")
    by_policy = gradients.log_probs_grad(z, ids[:, None], by_log_prob[:, None]) - 0.1 * gradients.entropy_grad(z)
    by_divergence = {
        "forward_kl": gradients.forward_kl_grad(z, y),
        "reverse_kl": gradients.reverse_kl_grad(z, y),
        "jsd": gradients.jsd_grad(z, y, 0.3),
        "skew_forward_kl": gradients.skew_forward_kl_grad(z, y, 0.3),
        "skew_reverse_kl": gradients.skew_reverse_kl_grad(z, y, 0.3),
    }[divergence]
    entropy = logits.entropy(y)
    weights = distillation.entropy_weights(entropy, 1.0, distillation.weight_log_mean(entropy[sdpo], 1.0))
    kappa = distillation.importance_clip(log_probs, inputs["old_log_probs"], 2.0)
    by_distillation = (weights * kappa * inputs["is_weights"])[:, None] * by_divergence
    by_logits = torch.where(sdpo[:, None], by_distillation, by_policy) / len(ids)
    expected = gradients.head_grads(by_logits * gradients.transform_grad(x, **head), hidden, weight)
    for grad, expected_grad in zip(grads(output.loss, inputs), expected, strict=True):
        torch.testing.assert_close(grad, expected_grad)


def test_clip_counts(config: Make) -> None:
    ratio = torch.tensor([0.5, 0.5, 0.5, 2.0, 2.0, 5.0, 5.0])
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0, -1.0, 0.0])

    def counts(**overrides: Any) -> list[float]:
        old, sequences = torch.zeros_like(ratio), torch.arange(len(ratio))
        clips = policy.clip_masks(ratio.log(), old, advantages, config(**overrides), sequences)
        return [int(mask.sum()) for mask in clips.values()]

    assert counts() == [2, 1, 0]
    assert counts(dual_clip=3.0) == [2, 1, 1]
    assert counts(dual_clip=3.0, delta=2.5) == [2, 1, 0]
    assert counts(loss_type="cispo") == [3, 3, 0]
    assert counts(loss_type="sapo") == counts(loss_type="reinforce") == [0, 0, 0]


def test_low_precision_inputs_are_computed_in_fp32(config: Make, batch: Make, packed: Make) -> None:
    inputs = packed(batch())
    inputs = {k: v.detach().bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    output = reference.srpo_loss(**inputs, config=config())
    upcast = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    assert output.loss.dtype == output.log_probs.dtype == torch.float32
    assert {value.dtype for value in output.metrics.values()} == {torch.float32}
    assert torch.equal(output.loss, reference.srpo_loss(**upcast, config=config()).loss)


def test_missing_inputs_are_named(config: Make, batch: Make, packed: Make) -> None:
    inputs = batch()
    with pytest.raises(ValueError, match="teacher_hidden"):
        reference.srpo_loss(**inputs | {"teacher_hidden": None}, config=config())
    with pytest.raises(ValueError, match="ref_log_probs"):
        reference.srpo_loss(**inputs | {"ref_log_probs": None}, config=config(kl_coef=0.1))
    with pytest.raises(ValueError, match="sequence_ids"):
        reference.srpo_loss(**packed(inputs) | {"sequence_ids": None}, config=config(loss_type="gspo"))
