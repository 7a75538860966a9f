"""Rows at the edges of fp32: unlikely and excluded tokens, saturated and huge logits, far policies.

Logits are given by a head whose hidden states are rows of the identity: ``logits = weight.T`` to the last digit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from srpo_kernels import SRPOConfig, policy_loss, srpo_loss, token_stats
from srpo_kernels.losses.options import DISTILLATION_MODES, KL_TYPES, LOSS_TYPES
from srpo_kernels.rows.mixture import MIXTURE_DIVERGENCES, Divergence
from srpo_kernels.rows.spec import DIVERGENCES
from tests.comparison import run_loss, run_stats
from tests.inputs import Inputs, cast
from tests.strategies import each_backend

LOWEST_FP32 = torch.finfo(torch.float32).min
INF = float("inf")


def heads(z: Tensor, y: Tensor | None = None, target_ids: Tensor | None = None) -> Inputs:
    """A student whose logits are ``z`` ``[n, V]``, and a teacher whose are ``y``."""
    inputs: Inputs = {
        "hidden": torch.eye(len(z)),
        "weight": z.T.contiguous(),
        "target_ids": torch.zeros(len(z), dtype=torch.int64) if target_ids is None else target_ids,
    }
    if y is not None:
        inputs |= {"teacher_hidden": torch.eye(len(y)), "teacher_weight": y.T.contiguous()}
    return inputs


def distilled(z: Tensor, y: Tensor, **inputs: Any) -> Inputs:
    """All rows in the distillation branch."""
    return heads(z, y) | {"sdpo_mask": torch.ones(len(z), dtype=torch.bool)} | inputs


def exact_loss(inputs: Inputs, config: SRPOConfig) -> dict[str, Tensor]:
    return run_loss(reference.srpo_loss, cast(inputs, torch.float64), config=config)


@each_backend
@pytest.mark.parametrize("options", [{}, {"softcap": 400.0, "temperature": 2.0}], ids=["plain", "softcap"])
def test_log_probs_of_unlikely_targets(options: dict[str, float], backend: str) -> None:
    z = torch.tensor([[0.0, -50.0], [0.0, -100.0], [0.0, -300.0], [5.0, -1000.0]])
    inputs = heads(z, z.flip(0), torch.ones(4, dtype=torch.int64))
    upstream = torch.ones(3, 4, dtype=torch.float64)
    actual = run_stats(token_stats, inputs, upstream, backend=backend, divergence="forward_kl", **options)
    exact = run_stats(reference.token_stats, cast(inputs, torch.float64), upstream, divergence="forward_kl", **options)
    for name, value in exact.items():
        torch.testing.assert_close(actual[name].double(), value, rtol=1e-5, atol=1e-5, msg=name)


@each_backend
@pytest.mark.parametrize("mode", DISTILLATION_MODES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_distillation_of_unlikely_tokens(divergence: str, mode: str, backend: str) -> None:
    """The tail of top-k lies at e^-200 for the student, where the teacher has much of its probability."""
    z = torch.tensor([[0.0, -1.0, -200.0, -201.0], [0.0, -100.0, -200.0, -90.0]])
    y = torch.tensor([[0.0, -1.0, 0.1, 0.2], [0.0, -300.0, 1.0, -1.0]])
    inputs = distilled(z, y, target_ids=torch.tensor([2, 1]))
    config = SRPOConfig(divergence=divergence, distillation_mode=mode, topk=2, dw_beta=0.0)
    actual = run_loss(srpo_loss, inputs, config=config, backend=backend)
    for name, value in exact_loss(inputs, config).items():
        torch.testing.assert_close(actual[name].double(), value, rtol=2e-5, atol=1e-5, msg=name)


BANS = {"both": (True, True), "teacher": (False, True)}


@each_backend
@pytest.mark.parametrize("who", BANS)
@pytest.mark.parametrize("ban", [-INF, LOWEST_FP32])
@pytest.mark.parametrize("transform", [{}, {"logit_scale": 0.5, "temperature": 0.7}, {"softcap": 30.0}], ids=str)
@pytest.mark.parametrize("mode", ["full", "topk"])
def test_excluded_tokens(mode: str, transform: dict[str, float], ban: float, who: str, backend: str) -> None:
    """Finite, and what the oracle says: a token that both models exclude adds nothing."""
    torch.manual_seed(1)
    bias, banned = torch.zeros(37), torch.tensor([3, 7, 36])
    bias[banned] = ban
    student, teacher = BANS[who]
    inputs = {
        "hidden": torch.randn(4, 5),
        "weight": torch.randn(37, 5),
        "bias": bias if student else torch.zeros(37),
        "target_ids": torch.tensor([0, 2, 4, 6]),
        "teacher_hidden": torch.randn(4, 5),
        "teacher_weight": torch.randn(37, 5),
        "teacher_bias": bias if teacher else torch.zeros(37),
        "sdpo_mask": torch.arange(4) < 2,
        "advantages": torch.tensor([1.0, 1.0, -1.0, 1.0]),
    }
    for divergence in DIVERGENCES:
        # More than the tokens that are left: the support of top-k has excluded ones in it.
        config = SRPOConfig(
            divergence=divergence, distillation_mode=mode, topk=36, dw_beta=0.0, entropy_coef=0.1, **transform
        )
        actual, exact = run_loss(srpo_loss, inputs, config=config, backend=backend), exact_loss(inputs, config)
        for name, value in exact.items():
            scale = float(value.abs().max())
            assert actual[name].isfinite().all(), (divergence, name)
            torch.testing.assert_close(actual[name].double(), value, rtol=1e-4, atol=2e-6 * scale + 1e-7, msg=name)
        upstream = torch.ones(3, 4, dtype=torch.float64)
        call = {name: inputs[name] for name in ("hidden", "weight", "bias", "target_ids")}
        call |= {name: inputs[name] for name in ("teacher_hidden", "teacher_weight", "teacher_bias")}
        options = {"divergence": divergence} | transform
        stats = run_stats(token_stats, call, upstream, backend=backend, **options)
        expected = run_stats(reference.token_stats, cast(call, torch.float64), upstream, **options)
        for name, value in expected.items():
            scale = float(value.abs().max())
            torch.testing.assert_close(stats[name].double(), value, rtol=1e-4, atol=2e-6 * scale + 1e-6, msg=name)


@each_backend
@pytest.mark.parametrize("kl_type", KL_TYPES)
def test_a_reference_that_is_far_away(kl_type: str, backend: str) -> None:
    """Finite for any finite input, and bounded as the policy's ratio is."""
    inputs = heads(torch.zeros(6, 8)) | {
        "advantages": torch.ones(6),
        "ref_log_probs": torch.tensor([-1.0, 15.0, 25.0, 70.0, 1e4, -1e4]),
    }
    for clamp in (20.0, None):
        config = SRPOConfig(kl_coef=1e-3, kl_type=kl_type, log_ratio_clamp=clamp)
        actual, exact = run_loss(srpo_loss, inputs, config=config, backend=backend), exact_loss(inputs, config)
        for name, value in exact.items():
            assert actual[name].isfinite().all(), name
            # One row may be far larger than the others, whose gradients it is added to.
            atol = 1e-5 + 1e-6 * float(value.abs().max())
            torch.testing.assert_close(actual[name].double(), value, rtol=2e-5, atol=atol, msg=name)


@each_backend
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("gap", [100.0, 1e4, 1e30])
def test_a_sampling_policy_that_is_far_away(gap: float, loss_type: str, backend: str) -> None:
    inputs = heads(torch.zeros(4, 8)) | {
        # The first two losses are huge: what is left of their sum must not depend on its order.
        "advantages": torch.tensor([1.0, -0.5, 1.0, -1.0]),
        "old_log_probs": torch.tensor([-gap, -gap, gap, gap]),
        "sequence_ids": torch.arange(4),
    }
    # All covariances are equal: the share takes the first.
    options = {"kl_cov": {"share": 0.5}, "clip_cov": {"share": 0.5, "cov_low": -1.0}}.get(loss_type, {})
    config = SRPOConfig(loss_type=loss_type, loss_options=options, log_ratio_clamp=None)
    actual, exact = run_loss(srpo_loss, inputs, config=config, backend=backend), exact_loss(inputs, config)
    for name, value in exact.items():
        assert actual[name].isfinite().all(), name
        torch.testing.assert_close(actual[name].double(), value, rtol=1e-4, atol=1e-6, msg=name)

    log_probs = torch.full((4,), -2.0, requires_grad=True)
    rows = {name: inputs[name] for name in ("advantages", "old_log_probs", "sequence_ids")}
    terms = policy_loss(log_probs, **rows, config=config)
    (grad,) = torch.autograd.grad(terms.loss.sum(), log_probs)
    assert terms.loss.isfinite().all()
    assert grad.isfinite().all()


@each_backend
def test_every_row_whose_loss_is_not_finite_is_counted(backend: str) -> None:
    z = torch.zeros(6, 8)
    inputs = heads(z, z) | {
        "advantages": torch.ones(6),
        "sdpo_mask": torch.arange(6) >= 4,
        "is_weights": torch.tensor([1.0, INF, 1.0, 1.0, 1.0, float("nan")]),
    }
    config = SRPOConfig(dw_beta=0.0)
    assert run_loss(srpo_loss, inputs, config=config, backend=backend)["metric nonfinite_rows"] == 2
    assert run_loss(srpo_loss, inputs, (), config=config, backend=backend)["metric nonfinite_rows"] == 2


@each_backend
@pytest.mark.parametrize("leaves", [("hidden", "weight"), ("hidden",), ("weight",)], ids=str)
def test_a_row_whose_gradient_alone_is_not_finite_is_counted(leaves: tuple[str, ...], backend: str) -> None:
    """A loss of 2e38: its gradient by a hidden state, or under a large scale by a logit, is beyond fp32."""
    inputs = {
        "hidden": torch.ones(3, 1),
        "weight": torch.tensor([[10.0], [-10.0]]),
        "bias": torch.tensor([-10.0, 10.0]),
        "target_ids": torch.tensor([0, 1, 0]),
        "advantages": torch.tensor([3e38, 1.0, 0.0]),
        "sequence_ids": torch.zeros(3, dtype=torch.int64),
    }
    for scale, wanted in ((1.0, "hidden" in leaves), (1e4, True)):
        config = SRPOConfig(loss_type="reinforce", reduction="constant", max_length=1, logit_scale=scale)
        out = run_loss(srpo_loss, inputs, leaves, config=config, backend=backend)
        assert out["loss"].isfinite()
        assert out["metric nonfinite_rows"] == wanted
        assert all(out[f"grad {name}"].isfinite().all() for name in leaves) == (not wanted)


@each_backend
@pytest.mark.parametrize("scale", [1e5, 1e8, 1e10, 1e15, 1e20])
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_huge_logits_are_right_or_not_finite(
    divergence: Divergence, clip: float | None, scale: float, backend: str
) -> None:
    z = scale * torch.tensor([[1.0, 0.5, -1.0, 0.0], [1.0, 1.0, 0.0, -1.0]])
    y = scale * torch.tensor([[0.0, 1.0, -1.0, 0.5], [0.0, 1.0, 1.0, 0.0]])
    config = SRPOConfig(divergence=divergence, divergence_clip=clip, dw_beta=0.0)
    for inputs in (distilled(z, y), heads(z) | {"advantages": torch.ones(2), "old_log_probs": -torch.ones(2)}):
        actual, exact = run_loss(srpo_loss, inputs, config=config, backend=backend), exact_loss(inputs, config)
        counted = actual["metric nonfinite_rows"] > 0
        # What is summed over the vocabulary may cancel; a row's dlogits are a column of dW.
        sizes = exact | {"grad hidden": exact["grad weight"].T.abs() @ inputs["weight"].double().abs()}
        for name, value in exact.items():
            if name == "metric nonfinite_rows":
                continue
            tolerance = 2e-6 * sizes[name].abs() + 1e-6 * (1 + scale * ("grad" in name))
            wrong = (actual[name].double() - value).abs() > tolerance
            assert not (wrong & actual[name].isfinite()).any(), name
            assert counted or actual[name].isfinite().all(), name


@each_backend
def test_log_probs_and_entropies_keep_their_sign(backend: str) -> None:
    torch.manual_seed(0)
    z = torch.cat([scale * torch.randn(40, 33) for scale in (1.0, 100.0, 1e4)])
    stats = token_stats(**heads(z, z, z.argmax(1)), backend=backend)
    assert (stats.log_probs <= 0).all()
    for value in (stats.entropy, stats.divergence, stats.teacher_entropy):
        assert value is not None
        assert (value >= 0).all()


@each_backend
@pytest.mark.parametrize("alpha", [1e-6, 0.1, 0.9, 1 - 1e-6])
@pytest.mark.parametrize("divergence", MIXTURE_DIVERGENCES)
def test_mixtures_of_any_share(divergence: str, alpha: float, backend: str) -> None:
    """Equal models, one token alone for both and for either, and models that are apart: a share of 1e-6 counts."""
    torch.manual_seed(0)
    z, y = torch.randn(2, 6, 65).unbind()
    y[1] = z[1]
    for row, models in ((2, (z, y)), (3, (z,)), (4, (y,))):
        for logits in models:
            logits[row] = -1e30
            logits[row, row] = 2.0
    z[5], y[5] = 30.0 * z[5], 30.0 * y[5]
    upstream = torch.zeros(3, 6, dtype=torch.float64)
    upstream[2] = 1.0
    for names in (("divergence",), ("divergence", "log_probs")):
        # With the log-probs' gradient the torch backend takes its other way, from sums.
        upstream[0] = float("log_probs" in names)
        options = {"divergence": divergence, "alpha": alpha}
        actual = run_stats(token_stats, heads(z, y), upstream, ("weight",), backend=backend, **options)
        exact = run_stats(reference.token_stats, cast(heads(z, y), torch.float64), upstream, ("weight",), **options)
        torch.testing.assert_close(actual["divergence"].double(), exact["divergence"], rtol=2e-6, atol=5e-7)
        torch.testing.assert_close(actual["grad weight"].double(), exact["grad weight"], rtol=1e-5, atol=3e-6)
        # The row of equal models.
        assert actual["divergence"][1] < 1e-7


@each_backend
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_divergence_is_negative(divergence: str, backend: str) -> None:
    torch.manual_seed(0)
    z = torch.randn(24 if backend == "torch" else 8, 257)
    for gap in (0.0, 1e-7, 1e-5, 1e-3):
        y = z + gap * torch.randn_like(z)
        out = run_loss(srpo_loss, distilled(z, y), config=SRPOConfig(divergence=divergence), backend=backend)
        assert out["loss"] >= 0
        value = token_stats(**heads(z, y), divergence=divergence, backend=backend).divergence
        assert value is not None
        assert (value >= 0).all()


@each_backend
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("magnitude", [1e4, 1e5, 1e6])
def test_the_log_prob_of_a_token_that_has_all_of_the_probability_is_0(
    magnitude: float, temperature: float, backend: str
) -> None:
    weight = torch.full((40, 1), -magnitude) * (1 + torch.rand(40, 1))
    weight[7] = magnitude * 1.2345
    stats = token_stats(torch.ones(5, 1), weight, torch.full((5,), 7), temperature=temperature, backend=backend)
    assert (stats.log_probs == 0).all()
    assert (stats.entropy == 0).all()


@each_backend
def test_an_excluded_token_beside_a_missing_one_counts_once(backend: str) -> None:
    # A softcap makes a number of minus infinity, and an id that is none stands at the first token.
    bias, z = torch.tensor([-INF, 0.5, -INF]), torch.tensor([[0.0, -3.0, 0.0]])
    config = SRPOConfig(distillation_mode="topk", topk_of="teacher", softcap=5.0, add_tail=False)
    known = {"teacher_topk_ids": torch.tensor([[1, 0, -1]]), "teacher_topk_log_probs": torch.full((1, 3), -1.0)}
    actual = token_stats(
        **heads(z, target_ids=torch.ones(1, dtype=torch.int64)), bias=bias, **known, config=config, backend=backend
    )
    exact = (5.0 * torch.tanh((z.double() + bias) / 5.0)).log_softmax(-1)[:, 1]
    torch.testing.assert_close(actual.log_probs.double(), exact, rtol=1e-6, atol=1e-6)
