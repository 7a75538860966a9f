"""What a caller can get wrong: each bad call raises an error that names the argument and what came."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from srpo_kernels import Normalizers, SRPOConfig, SRPOLoss, srpo_loss, teacher_stats, token_stats
from tests.inputs import Inputs, head_inputs, loss_inputs

BadCall = tuple[str, Inputs, type[Exception], str]

PADDED = loss_inputs(0, (4, 6), 8, 33, teacher_size=5)
PACKED = loss_inputs(0, (23,), 8, 33, teacher_size=5)
OWN_HEAD = {"teacher_weight": None, "teacher_bias": None}
NO_TEACHER = OWN_HEAD | {"teacher_hidden": None}
TOKENS_ONLY = Normalizers(torch.tensor(23), torch.tensor(0.0))


def with_ids(*ids: int) -> Inputs:
    """Ids of zeros whose first ones are ``ids``, all of them valid."""
    target_ids = torch.zeros(24, dtype=torch.int64)
    target_ids[: len(ids)] = torch.tensor(ids)
    return {"target_ids": target_ids.view(4, 6), "mask": None}


def on_meta(name: str) -> Inputs:
    return {name: PADDED[name].to("meta")}


BAD_LOSS_CALLS: list[BadCall] = [
    ("hidden is a list", {"hidden": [[1.0]]}, TypeError, "hidden must be a torch.Tensor, got list"),
    ("hidden of integers", {"hidden": PADDED["hidden"].long()}, TypeError, "hidden must be float.*got int64"),
    ("hidden of fp8", {"hidden": PADDED["hidden"].to(torch.float8_e4m3fn)}, TypeError, "hidden.*got float8"),
    ("hidden of one row", {"hidden": torch.zeros(8)}, ValueError, r"hidden must have shape.*got \[8\]"),
    ("hidden of another width", {"hidden": torch.zeros(4, 6, 7)}, ValueError, r"hidden and weight.*\[4, 6, 7\]"),
    ("hidden of 4 dimensions", {"hidden": torch.zeros(2, 2, 6, 8)}, ValueError, "target_ids must have shape"),
    ("weight is None", {"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
    ("weight of bools", {"weight": torch.ones(33, 8) > 0}, TypeError, "weight must be float.*got bool"),
    ("weight of 3 dimensions", {"weight": torch.zeros(1, 33, 8)}, ValueError, r"weight.*got \[1, 33, 8\]"),
    ("weight transposed", {"weight": torch.zeros(8, 33)}, ValueError, r"hidden and weight.*\[8, 33\]"),
    ("an empty vocabulary", {"weight": torch.zeros(0, 8)}, ValueError, r"weight.*V and H at least 1.*\[0, 8\]"),
    ("weight on another device", on_meta("weight"), ValueError, "weight must be on the device.*cpu, got meta"),
    ("bias of another vocabulary", {"bias": torch.zeros(32)}, ValueError, r"bias.*\[33\].*got \[32\]"),
    ("bias of integers", {"bias": torch.zeros(33).int()}, TypeError, "bias must be float.*got int32"),
    ("target_ids of floats", {"target_ids": torch.zeros(4, 6)}, TypeError, "target_ids.*int64.*got float32"),
    ("target_ids of bools", {"target_ids": torch.zeros(4, 6) > 0}, TypeError, "target_ids.*got bool"),
    ("target_ids transposed", {"target_ids": PADDED["target_ids"].t()}, ValueError, r"target_ids.*got \[6, 4\]"),
    ("target_ids below 0", with_ids(3, -1), ValueError, r"target_ids.*\[0, 33\).*got -1 at row 1"),
    ("target_ids of V", with_ids(33), ValueError, r"target_ids.*\[0, 33\).*got 33 at row 0"),
    ("mask of integers", {"mask": PADDED["mask"].long()}, TypeError, "mask must be bool, got int64"),
    ("mask per sequence", {"mask": PADDED["mask"][:, 0]}, ValueError, r"mask.*\[4, 6\].*got \[4\]"),
    ("mask on another device", on_meta("mask"), ValueError, "mask must be on the device.*got meta"),
    ("no advantages", {"advantages": None}, ValueError, "advantages is required.*got None"),
    ("advantages of integers", {"advantages": torch.ones(4).long()}, TypeError, "advantages.*got int64"),
    (
        "advantages of a group",
        {"advantages": torch.ones(2)},
        ValueError,
        r"advantages.*\[4, 6\] or \[4, 1\].*got \[2\]",
    ),
    ("advantages per position", {"advantages": torch.ones(6)}, ValueError, r"advantages.*got \[6\]"),
    ("sdpo_mask of floats", {"sdpo_mask": torch.ones(4)}, TypeError, "sdpo_mask must be bool, got float32"),
    ("sdpo_mask of a column", {"sdpo_mask": torch.ones(4, 1) > 0}, ValueError, r"sdpo_mask.*got \[4, 1\]"),
    ("no sdpo_mask", {"sdpo_mask": None}, ValueError, "teacher_hidden needs sdpo_mask"),
    ("no teacher_hidden", NO_TEACHER, ValueError, "teacher_hidden is required.*got None"),
    ("no states for the head", {"teacher_hidden": None}, ValueError, "teacher_weight needs teacher_hidden"),
    ("teacher_hidden of integers", {"teacher_hidden": torch.ones(4, 6, 5).int()}, TypeError, "teacher_hidden.*int32"),
    ("teacher_hidden of 1 of 4", {"teacher_hidden": torch.ones(1, 6, 5)}, ValueError, r"teacher_hidden.*\[1, 6, 5\]"),
    ("teacher_hidden too short", {"teacher_hidden": torch.ones(4, 5, 5)}, ValueError, r"teacher_hidden.*\[4, 5, 5\]"),
    ("teacher_hidden too wide", {"teacher_hidden": torch.ones(4, 6, 8)}, ValueError, r"teacher_hidden.*\[4, 6, 8\]"),
    ("a width without a head", OWN_HEAD, ValueError, r"teacher_hidden and weight.*teacher_weight.*\[4, 6, 5\]"),
    ("another vocabulary", {"teacher_weight": torch.ones(32, 5), "teacher_bias": None}, ValueError, r"one vocab.*32"),
    ("teacher_bias alone", {"teacher_weight": None}, ValueError, "teacher_bias needs teacher_weight"),
    ("teacher_bias too long", {"teacher_bias": torch.ones(34)}, ValueError, r"teacher_bias.*got \[34\]"),
    ("old_log_probs per sequence", {"old_log_probs": torch.ones(4)}, ValueError, r"old_log_probs.*got \[4\]"),
    ("old_log_probs of integers", {"old_log_probs": torch.ones(4, 6).int()}, TypeError, "old_log_probs.*int32"),
    ("ref_log_probs transposed", {"ref_log_probs": torch.ones(6, 4)}, ValueError, r"ref_log_probs.*got \[6, 4\]"),
    ("is_weights is a number", {"is_weights": 1.0}, TypeError, "is_weights must be a torch.Tensor, got float"),
    ("is_weights with a dimension", {"is_weights": torch.ones(4, 6, 1)}, ValueError, r"is_weights.*\[4, 6, 1\]"),
    ("sequence_ids of padded rows", {"sequence_ids": torch.ones(4, 6).long()}, ValueError, "sequence_ids.*packed"),
    ("normalizers is a tuple", {"normalizers": (1, 0.0)}, TypeError, "normalizers must be.*got tuple"),
    ("config is a dict", {"config": {"dw_beta": 1.0}}, TypeError, "config must be an SRPOConfig, got dict"),
    ("config is None", {"config": None}, TypeError, "config must be an SRPOConfig, got NoneType"),
    ("an unknown backend", {"backend": "cutlass"}, ValueError, "backend must be one of.*got 'cutlass'"),
    ("a workspace of a float", {"workspace_bytes": 1e9}, TypeError, "workspace_bytes must be an int.*got float"),
    ("a workspace below one row", {"workspace_bytes": 1000}, ValueError, "workspace_bytes.*at least.*got 1000"),
    ("a negative workspace", {"workspace_bytes": -1}, ValueError, "workspace_bytes.*at least.*got -1"),
    ("vocabulary shards", {"vocab_parallel_group": "world"}, TypeError, "vocab_parallel_group must be.*got str"),
    ("sequences in pieces", {"sequence_parallel_group": 1}, TypeError, "sequence_parallel_group must be.*got int"),
    (
        "a KL term without ref_log_probs",
        {"config": SRPOConfig(kl_coef=0.1), "ref_log_probs": None},
        ValueError,
        "ref_log_probs is required.*got None with kl_coef=0.1",
    ),
    (
        "a mean of sequences without their number",
        {"config": SRPOConfig(reduction="sequence"), "normalizers": TOKENS_ONLY},
        ValueError,
        "normalizers.sequence_count is required.*reduction='sequence', got None",
    ),
]

BAD_PACKED_CALLS: list[BadCall] = [
    (
        "gspo without sequence_ids",
        {"config": SRPOConfig(loss_type="gspo"), "sequence_ids": None},
        ValueError,
        "sequence_ids is required.*loss_type='gspo'.*got None",
    ),
    (
        "a mean of sequences without sequence_ids",
        {"config": SRPOConfig(reduction="sequence"), "sequence_ids": None},
        ValueError,
        "sequence_ids is required.*reduction='sequence', got None",
    ),
    (
        "a constant without sequence_ids",
        {"config": SRPOConfig(reduction="constant", max_length=9), "sequence_ids": None},
        ValueError,
        "sequence_ids is required.*reduction='constant', got None",
    ),
    ("sequence_ids of floats", {"sequence_ids": torch.ones(23)}, TypeError, "sequence_ids.*got float32"),
    ("sequence_ids of sequences", {"sequence_ids": torch.arange(5)}, ValueError, r"sequence_ids.*got \[5\]"),
    ("sdpo_mask of sequences", {"sdpo_mask": torch.ones(5) > 0}, ValueError, r"sdpo_mask.*\[23\].*got \[5\]"),
    ("advantages of sequences", {"advantages": torch.ones(5)}, ValueError, r"advantages.*\[23\].*got \[5\]"),
    ("teacher_hidden padded", {"teacher_hidden": torch.ones(4, 6, 5)}, ValueError, r"teacher_hidden.*\[4, 6, 5\]"),
]

STATS = head_inputs(0, (4, 6), 8, 33, teacher_size=5)

BAD_STATS_CALLS: list[BadCall] = [
    ("hidden is None", {"hidden": None}, TypeError, "hidden must be a torch.Tensor, got NoneType"),
    ("weight too narrow", {"weight": torch.ones(33, 7)}, ValueError, r"hidden and weight.*\[33, 7\]"),
    ("target_ids per sequence", {"target_ids": torch.ones(4).long()}, ValueError, r"target_ids.*got \[4\]"),
    ("target_ids of V", with_ids(33), ValueError, r"target_ids.*\[0, 33\).*got 33 at row 0"),
    ("mask of floats", {"mask": torch.ones(4, 6)}, TypeError, "mask must be bool, got float32"),
    ("teacher_hidden of one", {"teacher_hidden": torch.ones(1, 6, 5)}, ValueError, r"teacher_hidden.*\[1, 6, 5\]"),
    ("a head without states", {"teacher_hidden": None}, ValueError, "teacher_weight needs teacher_hidden"),
    ("teacher_bias alone", NO_TEACHER | {"teacher_bias": torch.ones(33)}, ValueError, "teacher_bias needs teacher_w"),
    ("an unknown divergence", {"divergence": "tv"}, ValueError, "divergence must be one of.*got 'tv'"),
    ("divergence is None", {"divergence": None}, TypeError, "divergence must be one of.*got None"),
    ("alpha of 0", {"alpha": 0.0}, ValueError, "alpha must be strictly between 0 and 1.*got 0.0"),
    ("a temperature of 0", {"temperature": 0.0}, ValueError, "temperature.*> 0, got 0.0"),
    ("a negative logit_scale", {"logit_scale": -1.0}, ValueError, "logit_scale.*> 0, got -1.0"),
    ("softcap is a string", {"softcap": "30"}, TypeError, "softcap must be a number.*got '30'"),
    ("a workspace below one row", {"workspace_bytes": 0}, ValueError, "workspace_bytes.*at least.*got 0"),
    ("vocabulary shards", {"vocab_parallel_group": "world"}, TypeError, "vocab_parallel_group must be.*got str"),
]

TEACHER = {"teacher_hidden": torch.ones(4, 6, 5), "teacher_weight": torch.ones(33, 5)}

BAD_TEACHER_CALLS: list[BadCall] = [
    ("teacher_hidden is None", {"teacher_hidden": None}, TypeError, "teacher_hidden must be.*got NoneType"),
    ("teacher_weight too narrow", {"teacher_weight": torch.ones(33, 4)}, ValueError, r"teacher_weight.*\[33, 4\]"),
    ("teacher_bias too short", {"teacher_bias": torch.ones(32)}, ValueError, r"teacher_bias.*got \[32\]"),
    ("mask too short", {"mask": torch.ones(4, 5) > 0}, ValueError, r"mask.*\[4, 6\].*got \[4, 5\]"),
    ("a temperature of NaN", {"temperature": float("nan")}, ValueError, "temperature must be a finite.*got nan"),
    ("softcap of 0", {"softcap": 0.0}, ValueError, "softcap.*> 0, or None, got 0.0"),
    ("an unknown backend", {"backend": ""}, ValueError, "backend must be one of.*got ''"),
]


def check(function: Callable[..., Any], good: Inputs, bad: BadCall) -> None:
    _, changes, error, message = bad
    function(**good)
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        function(**good | changes)


def name_of(bad: BadCall) -> str:
    return bad[0]


@pytest.mark.parametrize("bad", BAD_LOSS_CALLS, ids=name_of)
def test_srpo_loss(bad: BadCall) -> None:
    check(srpo_loss, PADDED, bad)


@pytest.mark.parametrize("bad", BAD_PACKED_CALLS, ids=name_of)
def test_srpo_loss_of_packed_rows(bad: BadCall) -> None:
    check(srpo_loss, PACKED, bad)


@pytest.mark.parametrize("bad", BAD_STATS_CALLS, ids=name_of)
def test_token_stats(bad: BadCall) -> None:
    check(token_stats, STATS, bad)


@pytest.mark.parametrize("bad", BAD_TEACHER_CALLS, ids=name_of)
def test_teacher_stats(bad: BadCall) -> None:
    check(teacher_stats, TEACHER, bad)


def test_srpo_loss_module() -> None:
    with pytest.raises(TypeError, match="config must be an SRPOConfig, got dict"):
        SRPOLoss({"dw_beta": 1.0})(**PADDED)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["config", "backend", "workspace_bytes"])
def test_srpo_loss_module_takes_its_own_options_once(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        SRPOLoss()(**PADDED, **{name: None})


def test_ids_that_are_masked_may_lie_outside_the_vocabulary() -> None:
    target_ids = PADDED["target_ids"].masked_fill(~PADDED["mask"], -100)
    assert srpo_loss(**PADDED | {"target_ids": target_ids}).loss == srpo_loss(**PADDED).loss
