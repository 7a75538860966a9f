from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srpo_kernels.losses.config import SRPOConfig
from srpo_kernels.losses.options import KL_TYPES, LOSS_TYPES, REDUCTIONS
from srpo_kernels.rows.spec import DIVERGENCES
from tests.strategies import configs

NUMBERS = (
    "epsilon_low",
    "epsilon_high",
    "delta",
    "dual_clip",
    "log_ratio_clamp",
    "kl_coef",
    "entropy_coef",
    "alpha",
    "distillation_is_clip",
    "dw_beta",
    "temperature",
    "logit_scale",
    "softcap",
)
OPTIONAL = (
    "delta", "dual_clip", "log_ratio_clamp", "distillation_is_clip", "softcap", "max_length", "rollout_correction",
    "teacher_transform", "divergence_clip",
)  # fmt: skip


def test_defaults_are_the_papers() -> None:
    assert dataclasses.asdict(SRPOConfig()) == {
        "loss_type": "grpo",
        "loss_options": (),
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "delta": None,
        "dual_clip": None,
        "log_ratio_clamp": 20.0,
        "kl_coef": 0.0,
        "kl_type": "k3",
        "entropy_coef": 0.0,
        "divergence": "jsd",
        "alpha": 0.5,
        "divergence_clip": None,
        "distillation_mode": "full",
        "topk": 100,
        "topk_of": "student",
        "add_tail": True,
        "distillation_is_clip": 2.0,
        "dw_beta": 1.0,
        "temperature": 1.0,
        "logit_scale": 1.0,
        "softcap": None,
        "teacher_transform": None,
        "reduction": "token",
        "max_length": None,
        "rollout_correction": None,
        "count_inactive": False,
        "count_entropy": False,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, f"loss_type must be one of {LOSS_TYPES}, got 'ppo'"),
        ({"kl_type": "k4"}, f"kl_type must be one of {KL_TYPES}, got 'k4'"),
        ({"divergence": "kl"}, f"divergence must be one of {DIVERGENCES}, got 'kl'"),
        ({"distillation_mode": "top"}, "distillation_mode must be one of ('full', 'topk', 'sampled')"),
        ({"reduction": "mean"}, f"reduction must be one of {REDUCTIONS}, got 'mean'"),
        ({"epsilon_low": -0.1}, "epsilon_low must be a finite number >= 0, got -0.1"),
        ({"epsilon_high": -1}, "epsilon_high must be a finite number >= 0, got -1"),
        ({"delta": 0.0}, "delta must be a finite number > 0, or None, got 0.0"),
        ({"dual_clip": 1.0}, "dual_clip must be a finite number > 1, or None, got 1.0"),
        ({"log_ratio_clamp": 0}, "log_ratio_clamp must be a finite number > 0, or None, got 0"),
        ({"kl_coef": -0.01}, "kl_coef must be a finite number >= 0, got -0.01"),
        ({"alpha": 1.5}, "alpha must be a finite number in [0, 1], got 1.5"),
        ({"alpha": 0.0}, "alpha must be strictly between 0 and 1 with divergence='jsd', got 0.0"),
        ({"alpha": 1}, "alpha must be strictly between 0 and 1 with divergence='jsd', got 1"),
        (
            {"divergence": "skew_forward_kl", "alpha": 0.0},
            "alpha must be strictly between 0 and 1 with divergence='skew_forward_kl', got 0.0",
        ),
        (
            {"divergence": "skew_reverse_kl", "alpha": 1.0},
            "alpha must be strictly between 0 and 1 with divergence='skew_reverse_kl', got 1.0",
        ),
        ({"topk": 0}, "topk must be an int >= 1, got 0"),
        ({"distillation_is_clip": 0.0}, "distillation_is_clip must be a finite number > 0, or None, got 0.0"),
        ({"dw_beta": -1.0}, "dw_beta must be a finite number >= 0, got -1.0"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0, got 0.0"),
        ({"logit_scale": -1.0}, "logit_scale must be a finite number > 0, got -1.0"),
        ({"softcap": 0.0}, "softcap must be a finite number > 0, or None, got 0.0"),
        ({"max_length": 0, "reduction": "constant"}, "max_length must be an int >= 1, got 0"),
        ({"max_length": 64}, "otherwise, got 64 with reduction='token'"),
        ({"reduction": "constant"}, "max_length must be given with reduction='constant'"),
        ({"delta": 4.0, "loss_type": "cispo"}, "delta must be None unless loss_type is 'grpo' or 'gspo'"),
        ({"dual_clip": 3.0, "loss_type": "sapo"}, "got 3.0 with loss_type='sapo'"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_by_name_value_and_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SRPOConfig(**options)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a finite number .*, got {value}"):
        SRPOConfig(**{name: value})


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(SRPOConfig)])
@pytest.mark.parametrize("value", [object(), [], "1.0", 1 + 0j])
def test_a_value_of_the_wrong_type_is_refused(name: str, value: object) -> None:
    # A str is the right type of a name.
    expected = (TypeError, ValueError) if isinstance(value, str) else TypeError
    with pytest.raises(expected, match=f"^{name} must be"):
        SRPOConfig(**{name: value})


@pytest.mark.parametrize("name", [*NUMBERS, "topk", "max_length"])
def test_a_bool_is_no_number(name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be .*, got True"):
        SRPOConfig(**{name: True})


@pytest.mark.parametrize("name", ["topk", "max_length"])
def test_a_count_is_an_int(name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be an int >= 1, got 8.0"):
        SRPOConfig(**{name: 8.0})


@pytest.mark.parametrize("name", ["add_tail", "count_inactive", "count_entropy"])
def test_a_number_is_no_bool(name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be a bool, got 1"):
        SRPOConfig(**{name: 1})


@pytest.mark.parametrize("name", sorted({field.name for field in dataclasses.fields(SRPOConfig)} - {*OPTIONAL}))
def test_only_the_optional_fields_take_none(name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be"):
        SRPOConfig(**{name: None})


def test_edges_of_the_ranges_are_accepted() -> None:
    SRPOConfig(epsilon_low=0, epsilon_high=0.0, kl_coef=0, dw_beta=0, topk=1, dual_clip=1.01, delta=1e-6)
    SRPOConfig(epsilon_low=3.0, entropy_coef=-1e-3, distillation_is_clip=None, log_ratio_clamp=None)
    SRPOConfig(loss_type="gspo", delta=2.0, dual_clip=3.0, reduction="constant", max_length=1)


@given(st.floats(0, 1), st.sampled_from(LOSS_TYPES))
def test_from_alpha_names_the_divergence(alpha: float, loss_type: str) -> None:
    config = SRPOConfig.from_alpha(alpha, loss_type=loss_type, temperature=0.7)
    assert config.divergence == DIVERGENCES[0 if alpha == 0 else 1 if alpha == 1 else 2]
    assert (config.alpha, config.loss_type, config.temperature) == (alpha, loss_type, 0.7)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_from_alpha_refuses_what_is_no_share(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha must be a finite number in \[0, 1\]"):
        SRPOConfig.from_alpha(alpha)


def test_from_alpha_refuses_a_second_name_for_the_divergence() -> None:
    with pytest.raises(TypeError, match="divergence"):
        SRPOConfig.from_alpha(0.5, divergence="jsd")


def test_it_is_an_immutable_value() -> None:
    config = SRPOConfig(temperature=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.temperature = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        SRPOConfig("grpo")  # type: ignore[misc]
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), SRPOConfig(temperature=0.5)):
        assert twin == config
        assert hash(twin) == hash(config)
    with pytest.raises(ValueError, match="temperature"):
        dataclasses.replace(config, temperature=0.0)


@given(configs())
def test_encoding_keeps_every_option(config: SRPOConfig) -> None:
    for twin in (config, copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config)):
        assert twin.encode() == config.encode()
    assert SRPOConfig.decode(config.encode()) == config
    assert dataclasses.replace(config, temperature=0.3).encode() != config.encode()
    assert "encoded" not in repr(config)


@pytest.mark.parametrize("name", ["max_length", "topk"])
@pytest.mark.parametrize("value", [10**400, 2**31])
def test_counts_of_a_config(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an int <= 2147483647"):
        SRPOConfig(**{"reduction": "constant", "max_length": 5} | {name: value})
