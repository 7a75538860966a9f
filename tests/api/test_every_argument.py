"""Every argument of every public function, in every wrong form: an error of the right type that names the argument."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import srpo_kernels as sk
from srpo_kernels.losses.srpo import METRICS
from tests.strategies import cast, head_inputs, loss_inputs

LOSS = cast(loss_inputs(0, (4, 6), teacher_size=5), torch.float32)
PACKED = cast(loss_inputs(0, (24,), teacher_size=5), torch.float32)
STATS = cast(head_inputs(0, (4, 6), 8, 33, teacher_size=5), torch.float32)
TEACHER = {name: STATS[name] for name in ("teacher_hidden", "teacher_weight", "teacher_bias", "mask")}
ROWS = {name: LOSS[name] for name in ("mask", "old_log_probs", "ref_log_probs", "is_weights")}
REWARDS = {"rewards": torch.tensor([0.0, 1.0, 0.5, 0.0]), "group_ids": torch.tensor([0, 0, 1, 1])}
COUNTS = {"mask": LOSS["mask"], "sdpo_mask": LOSS["sdpo_mask"], "teacher_entropy": torch.ones(4, 6)}
# Of no rows in particular: their mean weight is nobody's.
NORMALIZERS = sk.Normalizers.from_batch(**COUNTS, dw_beta=1.0)._replace(sdpo_count=None)
METRIC = torch.tensor(1.0)
EVERY_TERM = sk.SRPOConfig(kl_coef=0.1, entropy_coef=0.1, rollout_correction=sk.RolloutCorrection.tis())


# Three teachers of one head each.
HEADS = {name: [LOSS[name]] * 3 for name in ("teacher_weight", "teacher_bias")} | {
    "teacher_head_ids": torch.tensor([0, 1, 2, 0])
}
TOKENS = {name: x for name, x in LOSS.items() if name not in ("teacher_hidden", "teacher_weight", "teacher_bias")} | {
    "teacher_topk_ids": torch.zeros(4, 6, 1, dtype=torch.int64),
    "teacher_topk_log_probs": -torch.ones(4, 6, 1),
    "support_ids": torch.zeros(4, 6, 1, dtype=torch.int64),
    "config": sk.SRPOConfig(distillation_mode="topk", topk_of="teacher"),
}


# Numbers of the divergence by row.
OWN = {"divergence_alpha": torch.full((4, 6), 0.5), "divergence_clip": torch.ones(4, 6)}


class Function(NamedTuple):
    """A public function, and a call that it takes."""

    function: Callable[..., Any]
    call: dict[str, Any]


def objective(rows: sk.ObjectiveRows) -> Tensor:
    return rows.divergence - rows.log_probs


# Each row's teacher is its likeliest tokens.
KNOWN = {name: x for name, x in STATS.items() if not name.startswith("teacher")} | {
    name: TOKENS[name] for name in ("teacher_topk_ids", "teacher_topk_log_probs", "support_ids", "config")
}
FUSED = STATS | {"objective": objective, "teacher_mask": torch.ones(4, 6) > 0}
FUSED_PACKED = {name: x.flatten(0, 1) if name.endswith(("hidden", "mask", "ids")) else x for name, x in STATS.items()}

FUNCTIONS = {
    "fused_loss": Function(sk.fused_loss, FUSED),
    "fused_loss, packed": Function(
        sk.fused_loss,
        FUSED_PACKED | {"objective": objective, "sequence_ids": torch.arange(24) // 6, "whole_sequences": True},
    ),
    "fused_loss, some tokens": Function(sk.fused_loss, KNOWN | {"objective": objective}),
    "srpo_loss": Function(
        sk.srpo_loss, LOSS | {"normalizers": NORMALIZERS, "config": EVERY_TERM, "rollout_log_probs": -torch.ones(4, 6)}
    ),
    "srpo_loss, some tokens": Function(sk.srpo_loss, TOKENS),
    "srpo_loss, own divergences": Function(sk.srpo_loss, LOSS | OWN),
    "fused_loss, own divergences": Function(sk.fused_loss, FUSED | OWN),
    "srpo_loss, several teachers": Function(sk.srpo_loss, LOSS | HEADS),
    "fused_loss, several teachers": Function(sk.fused_loss, FUSED | HEADS),
    "srpo_loss, packed": Function(sk.srpo_loss, PACKED | {"config": sk.SRPOConfig(loss_type="gspo")}),
    "token_stats": Function(sk.token_stats, STATS),
    "token_stats, some tokens": Function(sk.token_stats, {k: x for k, x in KNOWN.items() if k != "config"}),
    "pad_support": Function(sk.pad_support, {"ids": torch.arange(5), "offsets": torch.tensor([0, 2, 5])}),
    "teacher_stats": Function(sk.teacher_stats, TEACHER),
    "policy_loss": Function(
        sk.policy_loss,
        ROWS
        | {"log_probs": -torch.ones(4, 6), "advantages": torch.ones(4), "entropy": torch.ones(4, 6)}
        | {"rollout_log_probs": -torch.ones(4, 6), "config": EVERY_TERM},
    ),
    "policy_loss, packed": Function(
        sk.policy_loss,
        {"log_probs": -torch.ones(24), "advantages": torch.ones(24), "sequence_ids": torch.arange(24) // 6}
        | {"config": sk.SRPOConfig(loss_type="gspo")},
    ),
    "sampled_distillation_loss": Function(
        sk.sampled_distillation_loss,
        {"log_probs": -torch.ones(4, 6), "teacher_log_probs": -torch.ones(4, 6), "mask": LOSS["mask"]}
        | {"old_log_probs": -torch.ones(4, 6), "is_weights": torch.ones(4, 6)}
        | {"rollout_log_probs": -torch.ones(4, 6), "config": EVERY_TERM},
    ),
    "sampled_distillation_loss, packed": Function(
        sk.sampled_distillation_loss,
        {"log_probs": -torch.ones(24), "teacher_log_probs": -torch.ones(24), "sequence_ids": torch.arange(24) // 6},
    ),
    "route_samples": Function(sk.route_samples, REWARDS | {"feedback_available": torch.ones(4) > 0}),
    "group_advantages": Function(sk.group_advantages, REWARDS),
    "Normalizers.from_batch": Function(sk.Normalizers.from_batch, COUNTS | {"dw_beta": 1.0}),
    "Normalizers.from_batch, packed": Function(
        sk.Normalizers.from_batch,
        {name: x.flatten() for name, x in COUNTS.items() if name != "sdpo_mask"}
        | {"sdpo_mask": torch.ones(24) > 0, "sequence_ids": torch.arange(24) // 6, "dw_beta": 1.0},
    ),
    "Normalizers.all_reduce": Function(sk.Normalizers.from_batch(**COUNTS, dw_beta=1.0).all_reduce, {}),
    "scale_for_gradient_mean": Function(sk.scale_for_gradient_mean, {"loss": torch.tensor(1.0)}),
    "call_as_forward": Function(sk.call_as_forward, {"module": nn.Linear(2, 2), "function": lambda: 1}),
    "SRPOLoss": Function(sk.SRPOLoss, {}),
    "SRPOConfig": Function(sk.SRPOConfig, {}),
}


# Tensors.


class Subclass(Tensor):
    """A tensor whose operations are a tensor's own."""


class Bad(NamedTuple):
    """A wrong form of an argument, the error that it is, and what the message says of it."""

    value: Any
    error: type[Exception]
    message: str


def bad_tensors(x: Tensor) -> Iterator[tuple[str, Bad]]:
    is_mask = x.dtype == torch.bool
    for kind in (list, tuple):
        yield kind.__name__, Bad(kind([1.0]), TypeError, rf"got {kind.__name__}: torch\.tensor\(\w+\) makes one")
    yield "array", Bad(x.numpy(), TypeError, r"got ndarray: torch\.as_tensor\(\w+\) makes one")
    yield "module", Bad(nn.Linear(2, 2), TypeError, "got Linear: its weight is one")
    for value in (1.0, "tensor", {"a": x}, object()):
        yield type(value).__name__, Bad(value, TypeError, f"got {type(value).__name__}")
    if x.ndim:
        yield "tensors", Bad(list(x), TypeError, r"got list: torch\.stack\(\w+\) makes one")
        yield "one more dimension", Bad(x[..., None, None], ValueError, r"\[.*, 1, 1\]")
        yield "sparse", Bad(x.to_sparse(), ValueError, r"must be a dense tensor, got torch\.sparse_coo")
        yield "on another device", Bad(x.to("meta"), ValueError, "meta")
    if x.ndim == 2:
        yield "CSR", Bad(x.to_sparse_csr(), ValueError, r"must be a dense tensor, got torch\.sparse_csr")
        yield "CSC", Bad(x.to_sparse_csc(), ValueError, r"must be a dense tensor, got torch\.sparse_csc")
        yield "nested", Bad(torch.nested.nested_tensor(list(x)), ValueError, "must be a dense tensor, got a nested")
        jagged = torch.nested.nested_tensor(list(x), layout=torch.jagged)
        yield "jagged", Bad(jagged, ValueError, "must be a dense tensor, got a nested")
    if x.dtype == torch.float32 and x.ndim:
        masked = torch.masked.masked_tensor(x.detach(), torch.ones_like(x) > 0)
        yield "masked", Bad(masked, ValueError, "must be a plain tensor, got MaskedTensor")
        yield "quantized", Bad(torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), TypeError, "got qint8")
        yield "lazy", Bad(nn.UninitializedParameter(), ValueError, "got an UninitializedParameter")
        if torch.backends.mkldnn.is_available():
            yield "mkldnn", Bad(x.to_mkldnn(), ValueError, r"must be a dense tensor, got torch\._mkldnn")
    for dtype in (torch.complex64, torch.float8_e4m3fn, torch.uint16, torch.uint64):
        yield str(dtype), Bad(x.to(dtype), TypeError, f"got {str(dtype).removeprefix('torch.')}")
    if is_mask:
        for number in (x.long(), x.to(torch.uint8), x.float(), x.bfloat16()):
            yield f"{number.dtype} mask", Bad(number, TypeError, r"must be bool, got \w+; \w+\.bool\(\) is true where")


with warnings.catch_warnings(action="ignore"):
    # Some of torch's forms are beta or on their way out.
    TENSOR_CASES = [
        pytest.param(name, argument, bad, id=f"{name}-{argument}-{form}")
        for name, (_, call) in FUNCTIONS.items()
        for argument, value in call.items()
        if isinstance(value, Tensor)
        for form, bad in bad_tensors(value)
        # A list of heads is another thing, with errors of its own.
        if not (argument == "teacher_weight" and form in ("list", "tuple", "tensors"))
    ]


def check(name: str, argument: str, bad: Bad) -> None:
    function, call = FUNCTIONS[name]
    with pytest.raises(bad.error) as caught:
        function(**call | {argument: bad.value})
    # What has no data is the device of the others, or this argument's own.
    names = rf"(\w+ must be on the device of the other arguments, meta|{argument}\b)"
    assert re.search(rf"{names}.*{bad.message}" if bad.message != "meta" else names, str(caught.value), re.DOTALL)


@pytest.mark.parametrize(("name", "argument", "bad"), TENSOR_CASES)
def test_tensors(name: str, argument: str, bad: Bad) -> None:
    check(name, argument, bad)


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


# Numbers, counts, names and objects.

NUMBERS = {
    "bool": Bad(True, TypeError, "must be a number.*got True"),
    "string": Bad("1", TypeError, "must be a number.*got '1'"),
    "tensor": Bad(torch.tensor(0.5), TypeError, r"must be a number.*got tensor\(0.5000\)"),
    "complex": Bad(0.5 + 0j, TypeError, "must be a number"),
    "fraction": Bad(Fraction(1, 2), TypeError, "must be a number"),
    "NaN": Bad(math.nan, ValueError, "must be a finite number.*got nan"),
    "inf": Bad(math.inf, ValueError, "must be a finite number.*got inf"),
    "beyond fp32": Bad(1e39, ValueError, r"got 1e\+39"),
    "an int beyond fp64": Bad(10**400, ValueError, "got an int of 1329 bits"),
    "an int too long to write": Bad(10**5000, ValueError, "got an int of 16610 bits"),
}
COUNT = {
    "bool": Bad(True, TypeError, "must be an int >= 1, got True"),
    "float": Bad(2.0, TypeError, "must be an int >= 1, got 2.0"),
    "tensor": Bad(torch.tensor(2), TypeError, r"must be an int >= 1, got tensor\(2\)"),
    "zero": Bad(0, ValueError, "must be an int >= 1, got 0"),
    "beyond int32": Bad(2**31, ValueError, "must be an int <= 2147483647, got 2147483648"),
    "beyond int64": Bad(10**400, ValueError, "must be an int <= 2147483647, got an int of 1329 bits"),
}
CHOICE = {
    "unknown": Bad("other", ValueError, "must be one of.*got 'other'"),
    "list": Bad(["torch"], (TypeError, ValueError), r"must be one of.*got \['torch'\]"),
    "number": Bad(1, (TypeError, ValueError), "must be one of.*got 1"),
}
BYTES = {
    "float": Bad(1e9, TypeError, "must be an int or None, got float"),
    "bool": Bad(True, TypeError, "must be an int or None, got bool"),
    "string": Bad("1G", TypeError, "must be an int or None, got str"),
    "beyond int64": Bad(10**400, ValueError, r"must be below 2\*\*63, got an int of 1329 bits"),
}
GROUP = {
    "string": Bad("world", TypeError, "must be a torch.distributed.ProcessGroup.*got str"),
    "not a member": Bad(-100, TypeError, "ProcessGroup that this process is in.*got int"),
}
CONFIG = {
    "dict": Bad({"dw_beta": 1.0}, TypeError, "must be an SRPOConfig.*got dict"),
    "class": Bad(sk.SRPOConfig, TypeError, "must be an SRPOConfig.*got type"),
}
OBJECT = {"list": Bad([1], TypeError, "must be .*got list"), "number": Bad(1, TypeError, "must be .*got int")}
FLAG = {"number": Bad(1, TypeError, "must be a bool, got 1"), "None": Bad(None, TypeError, "must be a bool, got None")}
# Of an argument that takes None, or has no wrong values of this kind, nothing is said here.
KINDS: dict[str, dict[str, Bad]] = (
    dict.fromkeys(("temperature", "logit_scale", "softcap", "alpha", "dw_beta", "success_threshold", "eps"), NUMBERS)
    | dict.fromkeys(("epsilon_low", "epsilon_high", "kl_coef", "entropy_coef", "log_ratio_clamp"), NUMBERS)
    | dict.fromkeys(("delta", "dual_clip", "distillation_is_clip"), NUMBERS)
    | dict.fromkeys(("world_size", "accumulation_steps", "topk"), COUNT)
    | dict.fromkeys(("backend", "engine", "divergence", "scale", "loss_type", "kl_type"), CHOICE)
    | dict.fromkeys(("distillation_mode", "reduction", "topk_of"), CHOICE)
    | dict.fromkeys(("vocab_parallel_group", "sequence_parallel_group", "group"), GROUP)
    | dict.fromkeys(("normalizers", "generator", "module", "function"), OBJECT)
    | dict.fromkeys(("add_tail", "count_inactive", "whole_sequences"), FLAG)
    | {"workspace_bytes": BYTES, "config": CONFIG}
)
# Wrong ones are in tests/losses/test_config.py, test_registry.py and test_rollout.py, and in
# tests/api/test_fused_loss.py and test_teacher_transform.py.
ELSEWHERE = {
    "max_length", "loss_options", "objective", "inputs", "rollout_correction", "teacher_transform", "divergence_clip",
}  # fmt: skip


def parameters(function: Callable[..., Any]) -> list[str]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, x in inspect.signature(function).parameters.items() if x.kind not in kinds]


OPTION_CASES = [
    pytest.param(name, argument, bad, id=f"{name}-{argument}-{form}")
    for name, (function, _) in FUNCTIONS.items()
    for argument in parameters(function)
    for form, bad in KINDS.get(argument, {}).items()
]


@pytest.mark.parametrize(("name", "argument", "bad"), OPTION_CASES)
def test_options(name: str, argument: str, bad: Bad) -> None:
    check(name, argument, bad)


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
