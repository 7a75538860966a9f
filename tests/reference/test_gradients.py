"""The closed-form derivatives against autograd, in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reference import distillation, gradients, logits, policy

EPSILONS = (0.2, 0.28)

shapes = given(seed=st.integers(0, 2**16), rows=st.integers(1, 5), vocabulary=st.sampled_from([1, 2, 3, 33, 129]))
seeds = given(seed=st.integers(0, 2**16))


def randn(seed: int, *shape: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def derivative(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of a function whose rows do not mix."""
    x = x.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(x).sum(), x)
    return grad


@shapes
def test_forward_and_reverse_kl(seed: int, rows: int, vocabulary: int) -> None:
    z, y = randn(seed, rows, vocabulary), randn(seed + 1, rows, vocabulary)
    log_q = y.log_softmax(-1)
    forward = derivative(lambda z: distillation.forward_kl(z.log_softmax(-1), log_q), z)
    torch.testing.assert_close(gradients.forward_kl_grad(z, y), forward)
    reverse = derivative(lambda z: distillation.reverse_kl(z.log_softmax(-1), log_q), z)
    torch.testing.assert_close(gradients.reverse_kl_grad(z, y), reverse)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
@shapes
def test_jsd(alpha: float, seed: int, rows: int, vocabulary: int) -> None:
    z, y = randn(seed, rows, vocabulary), randn(seed + 1, rows, vocabulary)
    expected = derivative(lambda z: distillation.jsd(z.log_softmax(-1), y.log_softmax(-1), alpha), z)
    torch.testing.assert_close(gradients.jsd_grad(z, y, alpha), expected)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
@shapes
def test_skewed_kl(alpha: float, seed: int, rows: int, vocabulary: int) -> None:
    z, y = randn(seed, rows, vocabulary), randn(seed + 1, rows, vocabulary)
    log_q = y.log_softmax(-1)
    forward = derivative(lambda z: distillation.skew_forward_kl(z.log_softmax(-1), log_q, alpha), z)
    torch.testing.assert_close(gradients.skew_forward_kl_grad(z, y, alpha), forward)
    reverse = derivative(lambda z: distillation.skew_reverse_kl(z.log_softmax(-1), log_q, alpha), z)
    torch.testing.assert_close(gradients.skew_reverse_kl_grad(z, y, alpha), reverse)


@shapes
def test_entropy(seed: int, rows: int, vocabulary: int) -> None:
    z = randn(seed, rows, vocabulary)
    torch.testing.assert_close(gradients.entropy_grad(z), derivative(logits.entropy, z))


@shapes
def test_log_probs_of_given_tokens(seed: int, rows: int, vocabulary: int) -> None:
    z, grad = randn(seed, rows, vocabulary), randn(seed + 1, rows, 3)
    ids = torch.randint(vocabulary, (rows, 3), generator=torch.Generator().manual_seed(seed))
    expected = derivative(lambda z: grad * logits.select_log_probs(z, ids), z)
    torch.testing.assert_close(gradients.log_probs_grad(z, ids, grad), expected)


@given(seed=st.integers(0, 2**16), rows=st.integers(1, 5), vocabulary=st.sampled_from([3, 33, 129]))
def test_top_k_is_the_log_prob_primitive(seed: int, rows: int, vocabulary: int) -> None:
    z, y = randn(seed, rows, vocabulary), randn(seed + 1, rows, vocabulary)
    expected = derivative(lambda z: distillation.jsd(*distillation.top_k_buckets(z, y, 2, True), 0.5), z)
    log_p, log_q = distillation.top_k_buckets(z, y, 2, add_tail=True)
    by_bucket = derivative(lambda log_p: distillation.jsd(log_p, log_q, 0.5), log_p)
    by_token = by_bucket[:, :2] + by_bucket[:, 2:] * gradients.log_tail_grad(log_p[:, :2])
    ids = z.topk(2, dim=-1).indices
    torch.testing.assert_close(gradients.log_probs_grad(z, ids, by_token), expected)


@shapes
def test_sampled_distillation_is_reverse_kl_in_expectation(seed: int, rows: int, vocabulary: int) -> None:
    z, y = randn(seed, rows, vocabulary), randn(seed + 1, rows, vocabulary)
    expected = gradients.reverse_kl_grad(z, y)
    by_token = derivative(lambda log_p: distillation.sampled_loss(log_p, y.log_softmax(-1)), z.log_softmax(-1))
    mean = torch.zeros_like(z)
    for token in range(vocabulary):
        ids = torch.full((rows, 1), token)
        mean += z.softmax(-1).gather(-1, ids) * gradients.log_probs_grad(z, ids, by_token.gather(-1, ids))
    torch.testing.assert_close(mean, expected)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_transform(softcap: float | None) -> None:
    options: dict[str, Any] = {"temperature": 0.7, "logit_scale": 1.3, "softcap": softcap}
    x = randn(0, 50)
    expected = derivative(lambda x: logits.transform(x, **options), x)
    torch.testing.assert_close(gradients.transform_grad(x, **options), expected)


def test_head() -> None:
    hidden, weight, bias = (randn(i, *shape).requires_grad_() for i, shape in enumerate([(4, 3), (5, 3), (5,)]))
    upstream = randn(9, 4, 5)
    expected = torch.autograd.grad(logits.head_logits(hidden, weight, bias), [hidden, weight, bias], upstream)
    for grad, expected_grad in zip(gradients.head_grads(upstream, hidden, weight), expected, strict=True):
        torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("delta", [None, 1.1, 2.0, 4.0])
@seeds
def test_clipped_loss(delta: float | None, dual_clip: float | None, seed: int) -> None:
    log_ratio, advantages = randn(seed, 40) / 2, randn(seed + 1, 40)

    def loss(log_ratio: Tensor) -> Tensor:
        value = policy.clipped_loss(log_ratio.exp(), advantages, *EPSILONS, delta)
        if dual_clip is None:
            return value
        binds = policy.dual_clip_binds(value, advantages, dual_clip)
        return torch.where(binds, -dual_clip * advantages, value)

    grad = gradients.clipped_loss_grad(log_ratio.exp(), advantages, *EPSILONS, delta, dual_clip)
    torch.testing.assert_close(grad, derivative(loss, log_ratio))


@seeds
def test_gspo_spreads_the_gradient_over_the_sequence(seed: int) -> None:
    log_ratio, advantages = randn(seed, 12) / 2, randn(seed + 1, 12)
    ids = torch.randint(4, (12,), generator=torch.Generator().manual_seed(seed))

    def loss(log_ratio: Tensor) -> Tensor:
        return policy.clipped_loss(policy.sequence_mean(log_ratio, ids).exp(), advantages, *EPSILONS)

    ratio = policy.sequence_mean(log_ratio, ids).exp()
    by_ratio = gradients.clipped_loss_grad(ratio, advantages, *EPSILONS)
    torch.testing.assert_close(gradients.sequence_mean_grad(by_ratio, ids), derivative(loss, log_ratio))


@seeds
def test_cispo_sapo_and_reinforce_losses(seed: int) -> None:
    log_probs, old, advantages = randn(seed, 40), randn(seed + 1, 40), randn(seed + 2, 40)
    ratio = (log_probs - old).exp()
    cispo = derivative(lambda x: policy.cispo_loss((x - old).exp(), x, advantages, *EPSILONS), log_probs)
    torch.testing.assert_close(gradients.cispo_loss_grad(ratio, advantages, *EPSILONS), cispo)
    sapo = derivative(lambda x: policy.sapo_loss((x - old).exp(), advantages), log_probs)
    torch.testing.assert_close(gradients.sapo_loss_grad(ratio, advantages), sapo)
    reinforce = derivative(lambda x: policy.reinforce_loss(x, advantages), log_probs)
    torch.testing.assert_close(gradients.reinforce_loss_grad(advantages), reinforce)


@pytest.mark.parametrize("clamp", [None, 1.5])
def test_log_ratio(clamp: float | None) -> None:
    log_probs, old = randn(0, 40), randn(1, 40)
    expected = derivative(lambda x: policy.log_ratio(x, old, clamp), log_probs)
    torch.testing.assert_close(gradients.log_ratio_grad(log_probs - old, clamp), expected)


@pytest.mark.parametrize("kl_type", ["k1", "k2", "k3"])
def test_kl_estimate(kl_type: str) -> None:
    log_probs, ref = randn(0, 40), randn(1, 40)
    expected = derivative(lambda x: policy.kl_estimate(x, ref, kl_type), log_probs)
    torch.testing.assert_close(gradients.kl_estimate_grad(log_probs, ref, kl_type), expected)
