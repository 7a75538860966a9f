"""What the paper states as numbers or as a table (arXiv 2604.02288), end to end through the public functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import srpo_kernels as sk
from tests.inputs import Inputs, loss_inputs, take

REWARDS = torch.tensor([1.0, 0.0, 0.4, 0.0, 0.0, 0.0, 1.0, 1.0, 0.5, 0.0])
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3, 4])


# Section 3.1, appendix B.5, table 7: which rollout goes where, and with what advantage.


def test_routing_truth_table() -> None:
    routing = sk.route_samples(REWARDS, GROUPS)
    advantages = sk.group_advantages(REWARDS, GROUPS)
    # Rollout: is it correct, is a sibling correct, where it goes.
    table = {
        0: (True, False, "policy"),
        1: (False, True, "sdpo"),
        2: (False, True, "sdpo"),
        3: (False, False, "policy without a gradient"),
        4: (False, False, "policy without a gradient"),
        5: (False, False, "policy without a gradient"),
        6: (True, True, "policy without a gradient"),
        7: (True, True, "policy without a gradient"),
        8: (True, False, "policy without a gradient"),
        9: (False, False, "policy without a gradient"),
    }
    for rollout, (correct, taught, branch) in table.items():
        assert bool(routing.correct[rollout]) is correct
        assert bool(routing.teacher_index[rollout] >= 0) is taught
        assert bool(routing.sdpo_mask[rollout]) is (branch == "sdpo")
        if branch.startswith("policy"):
            assert bool(advantages[rollout] == 0) is branch.endswith("without a gradient")


def test_the_route_is_not_the_sign_of_the_advantage() -> None:
    # Rollout 2 fails with 0.4; in a group of failures alone it has the best advantage, and still no teacher.
    rewards, groups = torch.tensor([0.4, 0.0, 0.0]), torch.zeros(3, dtype=torch.int64)
    assert sk.group_advantages(rewards, groups)[0] > 0
    assert not sk.route_samples(rewards, groups).sdpo_mask.any()


def routed_batch() -> Inputs:
    routing = sk.route_samples(REWARDS, GROUPS)
    inputs = loss_inputs(0, (10, 6), teacher_size=5)
    advantages = sk.group_advantages(REWARDS, GROUPS).double()
    return inputs | {"sdpo_mask": routing.sdpo_mask, "advantages": advantages}


def test_failures_without_a_teacher_cost_nothing_and_count_in_the_denominator() -> None:
    inputs = routed_batch()
    metrics = sk.srpo_loss(**inputs).metrics
    learning = inputs["mask"][:3]
    assert metrics["active_rows"] == learning.sum()
    assert metrics["sdpo_tokens"] == learning[1:].sum()
    assert metrics["policy_tokens"] + metrics["sdpo_tokens"] == inputs["mask"].sum()


# Section 3.2: the entropy-aware weight is 1 on average.


@pytest.mark.parametrize("dw_beta", [0.0, 0.5, 1.0, 4.0, 30.0])
def test_the_weights_average_to_1_over_the_distilled_tokens(dw_beta: float) -> None:
    metrics = sk.srpo_loss(**loss_inputs(0, (6, 7), spread=3.0), config=sk.SRPOConfig(dw_beta=dw_beta)).metrics
    torch.testing.assert_close(metrics["dw_weight_sum"], metrics["sdpo_tokens"])
    spread = sk.summarize_metrics(metrics)["srpo/dw_weight_std"]
    assert (spread > 0.05) is (dw_beta > 0)


def test_the_weights_of_micro_batches_average_to_1_together_not_apart() -> None:
    config = sk.SRPOConfig(dw_beta=2.0)
    whole = loss_inputs(0, (6, 7), spread=3.0) | {"sdpo_mask": torch.ones(6, dtype=torch.bool)}
    parts = [take(whole, torch.tensor(index)) for index in ([0], [1, 2, 3, 4, 5])]
    first, second = (
        sk.Normalizers.from_batch(
            part["mask"],
            part["sdpo_mask"],
            sk.teacher_stats(part["teacher_hidden"], part["weight"], teacher_bias=part["bias"]).entropy,
            config.dw_beta,
        )
        for part in parts
    )
    metrics = [sk.srpo_loss(**part, config=config, normalizers=first.merge(second)).metrics for part in parts]
    sums = [float(m["dw_weight_sum"]) for m in metrics]
    counts = [float(m["sdpo_tokens"]) for m in metrics]
    assert sum(sums) == pytest.approx(sum(counts))
    assert sums[0] != pytest.approx(counts[0], rel=0.02)


def test_a_certain_teacher_weighs_more() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 1, 8, generator=generator), torch.randn(33, 8, generator=generator)
    target_ids = torch.zeros(2, 1, dtype=torch.int64)
    teacher = torch.cat([10 * hidden[:1], 0.1 * hidden[1:]])
    entropy = sk.teacher_stats(teacher, weight).entropy.squeeze(1)
    assert entropy[0] < entropy[1]

    def weighted(keep: Tensor) -> Tensor:
        out = sk.srpo_loss(
            hidden,
            weight,
            target_ids,
            sdpo_mask=torch.tensor([True, True]),
            teacher_hidden=teacher,
            is_weights=keep[:, None].float(),
        )
        return out.metrics["sdpo_loss_sum"]

    divergence = sk.token_stats(hidden, weight, target_ids, teacher_hidden=teacher).divergence
    weights = torch.stack([weighted(torch.tensor(keep)) for keep in ([1, 0], [0, 1])]) / divergence.squeeze(1)
    expected = torch.exp(-entropy) / torch.exp(-entropy).mean()
    torch.testing.assert_close(weights, expected)


# Section 3.3: one denominator for both branches.


def test_both_branches_share_one_denominator() -> None:
    out = sk.srpo_loss(**routed_batch())
    m = out.metrics
    shared = (m["policy_loss_sum"] + m["sdpo_loss_sum"]) / (m["policy_tokens"] + m["sdpo_tokens"])
    torch.testing.assert_close(out.loss, shared)
    summary = sk.summarize_metrics(m)
    fraction = summary["srpo/sdpo_token_fraction"]
    mixture = fraction * summary["srpo/sdpo_loss"] + (1 - fraction) * summary["srpo/policy_loss"]
    assert float(out.loss) == pytest.approx(mixture)


def test_a_batch_of_one_branch_is_that_branch_alone() -> None:
    inputs = loss_inputs(0, (6, 7))
    nobody = torch.zeros(6, dtype=torch.bool)
    policy = sk.srpo_loss(**inputs | {"sdpo_mask": nobody})
    grpo = sk.srpo_loss(**inputs | {"sdpo_mask": None, "teacher_hidden": None})
    torch.testing.assert_close(policy.loss, grpo.loss, rtol=0, atol=0)
    models = ("hidden", "weight", "target_ids", "mask", "bias", "teacher_hidden")
    models_alone = {name: inputs[name] for name in models}
    sdpo = sk.srpo_loss(**models_alone, sdpo_mask=~nobody, config=sk.SRPOConfig(dw_beta=0.0))
    divergence = sk.token_stats(**models_alone).divergence
    torch.testing.assert_close(sdpo.loss, divergence.sum() / inputs["mask"].sum())


def test_the_defaults_are_those_of_the_paper() -> None:
    config = sk.SRPOConfig()
    assert (config.loss_type, config.epsilon_low, config.epsilon_high) == ("grpo", 0.2, 0.28)
    assert (config.divergence, config.alpha, config.dw_beta) == ("jsd", 0.5, 1.0)
    assert (config.kl_coef, config.reduction, config.distillation_is_clip) == (0.0, "token", 2.0)
