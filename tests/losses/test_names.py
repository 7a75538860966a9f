"""Every name of an option is implemented, in every implementation, and computes what no other name does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from srpo_kernels import SRPOConfig, group_advantages, policy_loss, srpo_loss, token_stats
from srpo_kernels.losses import options
from srpo_kernels.losses.options import DISTILLATION_MODES, KL_TYPES, LOSS_TYPES, REDUCTIONS, TOPK_OF
from srpo_kernels.losses.registry import POLICY_LOSSES
from srpo_kernels.rollout.routing import ADVANTAGE_SCALES
from srpo_kernels.rows.spec import DIVERGENCES
from tests.comparison import run_loss
from tests.inputs import Inputs, cast, loss_inputs
from tests.strategies import LOSS_OPTIONS, each_backend

NAMES = {
    "loss_type": LOSS_TYPES,
    "kl_type": KL_TYPES,
    "divergence": DIVERGENCES,
    "distillation_mode": DISTILLATION_MODES,
    "reduction": REDUCTIONS,
    "topk_of": TOPK_OF,
}
# Combined with which modes a divergence means something.
MODES = {"divergence": ("full", "topk"), "topk_of": ("topk",)}

LIBRARY: list[Any] = ["torch", "triton", "reference"]


def batch() -> Inputs:
    """All kinds of rows; ratios on both sides of the clips."""
    inputs = loss_inputs(3, (6, 5), teacher_size=5)
    inputs["sdpo_mask"] = torch.tensor([True, False, False, True, False, False])
    # Far from the reference at some tokens, where an estimator that is bounded is another.
    inputs["ref_log_probs"][:, 0] += 3.5
    inputs["advantages"] = torch.tensor([0.5, 1.5, -0.7, 0.3, -1.2, 0.9], dtype=torch.float64)
    return cast(inputs, torch.float32)


def options_of(option: str, name: str, mode: str = "full") -> dict[str, Any]:
    options = {"kl_coef": 0.3, "topk": 3, "distillation_mode": mode, option: name}
    # Where each does what no other does on a few rows.
    own = LOSS_OPTIONS.get(name, ({},))[0] if option == "loss_type" else {}
    options |= {"loss_options": own, "epsilon_low": 0.003, "epsilon_high": 0.004}
    return options | ({"max_length": 11} if options.get("reduction") == "constant" else {})


def compute(implementation: str, options: SRPOConfig) -> dict[str, Tensor]:
    if implementation in ("torch", "triton"):
        return run_loss(srpo_loss, batch(), config=options, backend=implementation)
    return run_loss(reference.srpo_loss, batch(), config=options)


@pytest.mark.parametrize("implementation", LIBRARY)
@pytest.mark.parametrize("option", NAMES)
def test_each_name_differs_from_every_other(option: str, implementation: str) -> None:
    for mode in MODES.get(option, ("full",)):
        results = {
            name: compute(implementation, SRPOConfig(**options_of(option, name, mode))) for name in NAMES[option]
        }
        # An estimator with a plus has another value with the gradient of k2.
        quantities = ("grad weight", "loss") if option == "kl_type" else ("grad weight",)
        for first, second in combinations(results, 2):
            pairs = [(results[first][name], results[second][name]) for name in quantities]
            assert any((a - b).abs().max() > 1e-4 * a.abs().max() for a, b in pairs), (mode, first, second)


@contextmanager
def planted(option: str) -> Iterator[str]:
    """A name that the config accepts and nothing implements: what is left of a change that stops half-way."""
    name = "planted"
    with pytest.MonkeyPatch.context() as patch:
        if option == "loss_type":
            patch.setitem(POLICY_LOSSES, name, POLICY_LOSSES["reinforce"])
        else:
            patch.setitem(options.CHOICES, option, (*options.CHOICES[option], name))
        yield name


@contextmanager
def not_registered() -> Iterator[None]:
    """As in a process that a config comes to from another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(POLICY_LOSSES, "planted", raising=False)
        yield


@pytest.mark.parametrize("implementation", LIBRARY)
@pytest.mark.parametrize("option", NAMES)
def test_a_name_that_nothing_implements_raises(option: str, implementation: str) -> None:
    for mode in MODES.get(option, ("full",)):
        with planted(option) as name:
            options = SRPOConfig(**options_of(option, name, mode))
            with not_registered(), pytest.raises(ValueError, match=f"{option}.*{name}"):
                compute(implementation, options)


@each_backend
def test_statistics_of_a_divergence_that_nothing_implements_raise(backend: str) -> None:
    x, ids = torch.randn(3, 4), torch.zeros(3, dtype=torch.int64)
    head = torch.randn(7, 4)
    with planted("divergence") as name, pytest.raises(ValueError, match=f"divergence.*{name}"):
        token_stats(x, head, ids, teacher_hidden=x, divergence=name, backend=backend)
    with pytest.raises(ValueError, match="divergence"):
        reference.token_stats(x, head, ids, teacher_hidden=x, divergence="planted")


@pytest.mark.parametrize("option", ["loss_type", "kl_type"])
def test_token_losses_of_a_name_that_nothing_implements_raise(option: str) -> None:
    log_probs = torch.full((2, 3), -1.0)
    with planted(option) as name:
        options = SRPOConfig(kl_coef=0.1, **{option: name})
        with not_registered(), pytest.raises(ValueError, match=f"{option}.*{name}"):
            policy_loss(log_probs, torch.ones(2), ref_log_probs=log_probs, config=options)


def test_scales_of_advantages() -> None:
    rewards = torch.tensor([0.0, 1.0, 0.3, 0.1, 0.2, 5.0])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    for function in (group_advantages, reference.group_advantages):
        results = [function(rewards, groups, scale=scale) for scale in ADVANTAGE_SCALES]
        assert all((a - b).abs().max() > 1e-3 for a, b in combinations(results, 2))
        with pytest.raises(ValueError, match="scale"):
            function(rewards, groups, scale="planted")
