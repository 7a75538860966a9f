"""Hand-computed values, over a vocabulary of two: ``p = (3/4, 1/4)``, ``q = (1/2, 1/2)``."""

from __future__ import annotations

from math import exp, log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reference import distillation, logits, policy, teacher_stats, token_stats

LOG_P = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()
LOG_Q = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_logits(seed: int, rows: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z, y = 3 * torch.randn(2, rows, vocabulary, generator=generator, dtype=torch.float64)
    return z, y


KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl")
shapes = given(seed=st.integers(0, 2**16), rows=st.integers(1, 4), vocabulary=st.sampled_from([1, 2, 7, 129]))


def test_divergences_of_two_coins() -> None:
    torch.testing.assert_close(distillation.forward_kl(LOG_P, LOG_Q), vector(0.5 * log(4 / 3)))
    torch.testing.assert_close(distillation.reverse_kl(LOG_P, LOG_Q), vector(0.75 * log(3 / 2) + 0.25 * log(1 / 2)))
    to_mixture = 0.75 * log(6 / 5) + 0.25 * log(2 / 3), 0.5 * log(4 / 5) + 0.5 * log(4 / 3)
    torch.testing.assert_close(distillation.jsd(LOG_P, LOG_Q, 0.5), vector(sum(to_mixture) / 2))


def test_jsd_weighs_the_teacher_by_alpha() -> None:
    # m = 3/5 p + 2/5 q = (13/20, 7/20)
    student = 0.75 * log(15 / 13) + 0.25 * log(5 / 7)
    teacher = 0.5 * log(10 / 13) + 0.5 * log(10 / 7)
    torch.testing.assert_close(distillation.jsd(LOG_P, LOG_Q, 0.4), vector(0.6 * student + 0.4 * teacher))


def test_skewed_divergences_of_two_coins() -> None:
    # m = 3/5 p + 2/5 q = (13/20, 7/20)
    forward = 0.5 * log(10 / 13) + 0.5 * log(10 / 7)
    torch.testing.assert_close(distillation.skew_forward_kl(LOG_P, LOG_Q, 0.4), vector(forward))
    # m = 3/5 q + 2/5 p = (3/5, 2/5)
    reverse = 0.75 * log(5 / 4) + 0.25 * log(5 / 8)
    torch.testing.assert_close(distillation.skew_reverse_kl(LOG_P, LOG_Q, 0.4), vector(reverse))


@shapes
def test_skewed_divergences_become_the_plain_ones(seed: int, rows: int, vocabulary: int) -> None:
    log_p, log_q = (x.log_softmax(-1) for x in random_logits(seed, rows, vocabulary))
    for kind in ("forward_kl", "reverse_kl"):
        plain = distillation.divergence(log_p, log_q, kind)
        skewed = distillation.divergence(log_p, log_q, f"skew_{kind}", 1e-9)
        torch.testing.assert_close(skewed, plain, rtol=1e-3, atol=1e-9)
        none = distillation.divergence(log_p, log_q, f"skew_{kind}", 1 - 1e-9)
        torch.testing.assert_close(none, torch.zeros_like(none))


@shapes
def test_jsd_is_symmetric_and_bounded_by_log_2(seed: int, rows: int, vocabulary: int) -> None:
    z, y = random_logits(seed, rows, vocabulary)
    log_p, log_q = (10 * z).log_softmax(-1), (10 * y).log_softmax(-1)
    value = distillation.jsd(log_p, log_q, 0.5)
    torch.testing.assert_close(value, distillation.jsd(log_q, log_p, 0.5))
    assert (value > -1e-12).all()
    assert (value < log(2) + 1e-12).all()


@pytest.mark.parametrize("kind", KINDS)
def test_divergence_from_oneself_is_zero(kind: str) -> None:
    torch.testing.assert_close(distillation.divergence(LOG_P, LOG_P, kind, 0.3), vector(0.0))


def test_jsd_of_disjoint_distributions_is_log_2() -> None:
    log_p = vector(0.0, -2000.0).log_softmax(-1)[None]
    torch.testing.assert_close(distillation.jsd(log_p, log_p.flip(-1), 0.5), vector(log(2)))


def test_entropy_and_log_probs_of_a_coin() -> None:
    z = LOG_P + 5
    torch.testing.assert_close(logits.entropy(z), vector(-0.75 * log(0.75) - 0.25 * log(0.25)))
    torch.testing.assert_close(logits.token_log_probs(z, torch.tensor([1])), vector(log(0.25)))


def test_transform_caps_scales_and_cools() -> None:
    x = vector(-1e6, 0.0, 1.0, 1e6)
    torch.testing.assert_close(logits.transform(x, temperature=2.0, logit_scale=3.0), 1.5 * x)
    capped = logits.transform(x, temperature=2.0, logit_scale=3.0, softcap=30.0)
    torch.testing.assert_close(capped, vector(-15.0, 0.0, 15 * torch.tanh(vector(0.1)).item(), 15.0))


def test_tail_bucket_holds_the_complement_mass() -> None:
    z = vector(0.5, 0.1, 0.25, 0.15).log()[None]
    y = vector(0.2, 0.4, 0.3, 0.1).log()[None]
    log_p, log_q = distillation.top_k_buckets(z, y, k=2, add_tail=True)
    torch.testing.assert_close(log_p.exp(), vector(0.5, 0.25, 0.25)[None])
    torch.testing.assert_close(log_q.exp(), vector(0.2, 0.3, 0.5)[None])
    log_p, log_q = distillation.top_k_buckets(z, y, k=2, add_tail=False)
    torch.testing.assert_close(log_p.exp(), vector(2 / 3, 1 / 3)[None])
    torch.testing.assert_close(log_q.exp(), vector(0.4, 0.6)[None])


def test_tail_bucket_survives_a_vanishing_complement() -> None:
    z = vector(0.0, -500.0, -500.0)[None]
    log_p, _ = distillation.top_k_buckets(z, z, k=1, add_tail=True)
    torch.testing.assert_close(log_p, vector(0.0, log(2) - 500)[None])


@shapes
def test_top_k_coarsens_the_full_divergence(seed: int, rows: int, vocabulary: int) -> None:
    z, y = random_logits(seed, rows, vocabulary)
    for kind in KINDS:
        full = distillation.divergence(z.log_softmax(-1), y.log_softmax(-1), kind)
        for add_tail in (True, False):
            everything = distillation.top_k_buckets(z, y, vocabulary + 3, add_tail)
            torch.testing.assert_close(distillation.divergence(*everything, kind), full)
        three = distillation.top_k_buckets(z, y, 3, add_tail=True)
        assert (distillation.divergence(*three, kind) < full + 1e-9).all()


def test_entropy_weights_average_to_one_and_trust_confident_teachers() -> None:
    entropy = vector(0.0, log(2), 5.0, 900.0)
    weights = distillation.entropy_weights(entropy, 1.0, distillation.weight_log_mean(entropy, 1.0))
    torch.testing.assert_close(weights.mean(), vector(1.0)[0])
    torch.testing.assert_close(weights[0] / weights[1], vector(2.0)[0])
    assert (weights.diff() < 0).all()
    flat = distillation.entropy_weights(entropy, 0.0, distillation.weight_log_mean(entropy, 0.0))
    torch.testing.assert_close(flat, torch.ones_like(flat))


def test_entropy_weights_do_not_underflow() -> None:
    entropy = vector(1000.0, 1001.0)
    weights = distillation.entropy_weights(entropy, 10.0, distillation.weight_log_mean(entropy, 10.0))
    torch.testing.assert_close(weights, vector(2 / (1 + exp(-10)), 2 * exp(-10) / (1 + exp(-10))))


def test_importance_clip() -> None:
    log_probs = vector(log(0.5), log(0.9), log(0.1)).requires_grad_()
    kappa = distillation.importance_clip(log_probs, vector(log(0.4), log(0.1), -900.0), 2.0)
    torch.testing.assert_close(kappa, vector(1.25, 2.0, 2.0))
    assert not kappa.requires_grad
    tiny = distillation.importance_clip(vector(-90.0), vector(0.0), 2.0)
    torch.testing.assert_close(tiny.log(), vector(-20.0))
    assert (distillation.importance_clip(log_probs, None, 2.0) == 1).all()
    assert (distillation.importance_clip(log_probs, log_probs, None) == 1).all()


def test_clipped_loss() -> None:
    ratio, positive, negative = vector(0.5, 1.0, 1.25, 2.0), vector(1.0), vector(-1.0)
    torch.testing.assert_close(policy.clipped_loss(ratio, positive, 0.2, 0.28), -vector(0.5, 1.0, 1.25, 1.28))
    torch.testing.assert_close(policy.clipped_loss(ratio, negative, 0.2, 0.28), vector(0.8, 1.0, 1.25, 2.0))
    capped = policy.clipped_loss(ratio, negative, 0.2, 0.28, delta=1.5)
    torch.testing.assert_close(capped, vector(0.8, 1.0, 1.25, 1.5))


def test_cispo_sapo_and_reinforce_losses() -> None:
    ratio, log_probs, advantages = vector(0.5, 1.0, 2.0), vector(-1.0, -2.0, -3.0), vector(1.0, -1.0, 2.0)
    torch.testing.assert_close(policy.cispo_loss(ratio, log_probs, advantages, 0.2, 0.28), vector(0.8, -2.0, 7.68))
    torch.testing.assert_close(policy.reinforce_loss(log_probs, advantages), vector(1.0, -2.0, 6.0))
    gates = vector(4 / (1 + exp(0.5)), 2 / 1.05, 4 / (1 + exp(-1.0)))
    torch.testing.assert_close(policy.sapo_loss(ratio, advantages), -advantages * gates)


def test_kl_estimates() -> None:
    log_probs, ref = vector(log(0.5)), vector(log(0.25))
    torch.testing.assert_close(policy.kl_estimate(log_probs, ref, "k1"), vector(log(2)))
    torch.testing.assert_close(policy.kl_estimate(log_probs, ref, "k2"), vector(log(2) ** 2 / 2))
    torch.testing.assert_close(policy.kl_estimate(log_probs, ref, "k3"), vector(0.5 + log(2) - 1))
    torch.testing.assert_close(policy.approx_kl(log_probs, ref, None), vector(2 - 1 - log(2)))


def test_log_ratio_is_clamped() -> None:
    torch.testing.assert_close(policy.log_ratio(vector(-1.0, 0.0), vector(-4.0, 9.0), 2.0), vector(2.0, -2.0))


def test_sequence_means_ignore_the_order_of_rows() -> None:
    values, ids = vector(1.0, 10.0, 3.0, 20.0, 5.0), torch.tensor([9, 4, 9, 4, 9])
    torch.testing.assert_close(policy.sequence_mean(values, ids), vector(3.0, 15.0, 3.0, 15.0, 3.0))


def test_token_stats_of_masked_rows_are_zero_and_without_a_teacher_half_is_none() -> None:
    hidden = torch.cat([LOG_P, torch.full_like(LOG_P, torch.nan)])
    target_ids, mask = torch.tensor([0, -100]), torch.tensor([True, False])
    weight = torch.eye(2, dtype=torch.float64)
    stats = token_stats(hidden, weight, target_ids, mask=mask, teacher_hidden=hidden)
    torch.testing.assert_close(stats.log_probs, vector(log(0.75), 0.0))
    torch.testing.assert_close(stats.divergence, vector(0.0, 0.0))
    torch.testing.assert_close(stats.entropy, stats.teacher_entropy)
    alone = token_stats(hidden, weight, target_ids, mask=mask)
    assert alone.divergence is None
    assert alone.teacher_entropy is None


def test_teacher_stats_are_the_entropy_and_logsumexp_of_the_teacher_and_zero_where_masked() -> None:
    hidden, weight, bias = torch.randn(2, 3, 4).double(), torch.randn(7, 4).double(), torch.randn(7).double()
    mask = torch.tensor([[True, False, True], [False, True, True]])
    hidden[~mask] = torch.nan
    stats = teacher_stats(hidden, weight, teacher_bias=bias, mask=mask, temperature=0.7, softcap=3.0)
    z = logits.head_logits(hidden[mask], weight, bias, temperature=0.7, softcap=3.0)
    torch.testing.assert_close(stats.entropy[mask], logits.entropy(z))
    torch.testing.assert_close(stats.logsumexp[mask], z.logsumexp(-1))
    assert not stats.entropy[~mask].any() and not stats.logsumexp[~mask].any()
