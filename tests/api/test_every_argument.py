"""Every argument of every public function, in every wrong form: an error of the right type that names the argument."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import srpo_kernels as sk
from srpo_kernels.losses.srpo import METRICS
from tests.api.calls import FUNCTIONS, STATS, TEACHER
from tests.api.wrong_forms import KINDS, Bad, bad_tensors

METRIC = torch.tensor(1.0)


class Subclass(Tensor):
    """A tensor whose operations are a tensor's own."""


def check(name: str, argument: str, form: str, bad: Bad) -> None:
    function, call = FUNCTIONS[name]
    with pytest.raises(bad.error) as caught:
        function(**call | {argument: bad.value})
        pytest.fail(f"{name} takes {argument}: {form}")
    # What has no data is the device of the others, or this argument's own.
    names = rf"(\w+ must be on the device of the other arguments, meta|{argument}\b)"
    pattern = rf"{names}.*{bad.message}" if bad.message != "meta" else names
    assert re.search(pattern, str(caught.value), re.DOTALL), f"{argument}: {form}"


TENSORS = [
    (name, argument)
    for name, (_, call) in FUNCTIONS.items()
    for argument, value in call.items()
    if isinstance(value, Tensor)
]


@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_tensors(name: str, argument: str) -> None:
    forms = bad_tensors(FUNCTIONS[name].call[argument])
    if argument == "teacher_weight":
        # A list of heads is another thing, with errors of its own.
        for form in ("list", "tuple", "tensors"):
            forms.pop(form)
    for form, bad in forms.items():
        check(name, argument, form, bad)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_good_calls_are_good(name: str) -> None:
    FUNCTIONS[name].function(**FUNCTIONS[name].call)


@pytest.mark.parametrize("name", [name for name, (_, call) in FUNCTIONS.items() if "config" in call or "mask" in call])
def test_a_subclass_without_operations_of_its_own_is_a_tensor(name: str) -> None:
    function, call = FUNCTIONS[name]
    expected = function(**call)[0]
    for argument, value in call.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(function(**call | {argument: value.as_subclass(Subclass)})[0] + 0, expected + 0)


# Wrong ones are in tests/losses/test_config.py, test_registry.py and test_rollout.py, and in
# tests/api/test_fused_loss.py and test_teacher_transform.py.
ELSEWHERE = {
    "max_length", "loss_options", "objective", "inputs", "rollout_correction", "teacher_transform", "divergence_clip",
}  # fmt: skip


def parameters(function: Callable[..., Any]) -> list[str]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, x in inspect.signature(function).parameters.items() if x.kind not in kinds]


OPTIONS = [
    (name, argument)
    for name, (function, _) in FUNCTIONS.items()
    for argument in parameters(function)
    if argument in KINDS
]


@pytest.mark.parametrize(("name", "argument"), OPTIONS)
def test_options(name: str, argument: str) -> None:
    for form, bad in KINDS[argument].items():
        check(name, argument, form, bad)


def test_no_argument_is_left_out() -> None:
    public = {name.split(",")[0].split(".")[0] for name in FUNCTIONS}
    results = {
        "PolicyTerms",
        "Routing",
        "SRPOOutput",
        "TeacherStats",
        "TokenStats",
        "FusedOutput",
        "TokenLoss",
    }
    rows = {"ObjectiveRows", "PolicyRows"}
    # One takes no argument, one is a dict, the others have tests of their own.
    elsewhere = {
        "release_workspace",
        "RolloutCorrection",
        "LogitTransform",
        "topk_entropy",
        "summarize_metrics",
        "register_policy_loss",
        "POLICY_LOSSES",
    }
    assert public == set(sk.__all__) - results - rows - elsewhere
    for name, (function, _) in FUNCTIONS.items():
        alike = [call for other, (_, call) in FUNCTIONS.items() if other.split(",")[0] == name.split(",")[0]]
        tensors = {argument for call in alike for argument, value in call.items() if isinstance(value, Tensor)}
        assert set(parameters(function)) <= tensors | KINDS.keys() | ELSEWHERE, name


@pytest.mark.parametrize("name", ["temperature", "logit_scale", "softcap"])
@pytest.mark.parametrize("value", [1e-320, 1e-38, 1e38])
def test_logits_that_float32_does_not_hold(name: str, value: float) -> None:
    for function, call in (
        (sk.SRPOConfig, {}),
        (sk.token_stats, STATS),
        (sk.teacher_stats, TEACHER),
    ):
        with pytest.raises(ValueError, match=rf"{name} must be in \[1e-37, 1e37\], the range of float32, got"):
            function(**call, **{name: value})
    with pytest.raises(ValueError, match=r"logit_scale / temperature must be in .*got 1e\+40"):
        sk.SRPOConfig(temperature=1e-20, logit_scale=1e20)


@pytest.mark.parametrize(
    ("metrics", "error", "message"),
    [
        (None, TypeError, "metrics must be the dict SRPOOutput.metrics, got NoneType"),
        (sk.SRPOOutput(METRIC, {}, METRIC), TypeError, "got SRPOOutput: give its metrics"),
        ([METRIC], TypeError, "metrics must be the dict.*got list"),
        (dict.fromkeys(METRICS, 1.0), TypeError, r"metrics\['policy_loss_sum'\] must be a torch.Tensor, got float"),
        (dict.fromkeys(METRICS, METRIC[None]), ValueError, r"metrics\['policy_loss_sum'\] must have shape \[\].*\[1\]"),
        (dict.fromkeys(METRICS, METRIC.to("meta")), ValueError, r"metrics\['policy_loss_sum'\].*got a tensor on meta"),
        (
            dict.fromkeys(METRICS, METRIC) | {"sdpo_tokens": METRIC > 0},
            TypeError,
            r"metrics\['sdpo_tokens'\].*got bool",
        ),
    ],
)
def test_metrics(metrics: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sk.summarize_metrics(metrics)
