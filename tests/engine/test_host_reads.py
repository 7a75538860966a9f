"""Where the host waits for a GPU: as docs/gpu.md has it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from srpo_kernels import (
    Normalizers,
    RolloutCorrection,
    SRPOConfig,
    fused_loss,
    srpo_loss,
    teacher_stats,
    token_stats,
)
from srpo_kernels.engine.row_values import check_support
from tests.comparison import with_leaves
from tests.inputs import cast, head_inputs, loss_inputs, workspace_floor
from tests.meters import HostReads

pytestmark = pytest.mark.interpreter

ORDER = "order.order_rows: tolist"
# Numbers of the host's own, and what multiplies dW where that is a number: on a CPU.
ON_A_CPU = {"transform._fp32: _local_scalar_dense", "gemm.add_weight: _local_scalar_dense"}


def reads_of(call: Callable[[], Any]) -> list[str]:
    """The lines at which the host would wait for a GPU."""
    with HostReads() as reads:
        call()
    return [line for line in reads.lines if line not in ON_A_CPU]


def inputs_of(config: SRPOConfig) -> dict[str, Any]:
    inputs = loss_inputs(1, (4, 6), teacher_size=5, config=config)
    return {name: x.float() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in inputs.items()}


@pytest.mark.parametrize(
    ("options", "others"),
    [
        ({}, []),
        ({"divergence": "reverse_kl", "entropy_coef": 0.1}, []),
        ({"distillation_mode": "sampled"}, []),
        ({"distillation_mode": "topk", "topk": 3}, []),
        ({"loss_type": "gspo", "reduction": "sequence"}, []),
        ({"dw_beta": 30.0}, []),
        ({"rollout_correction": RolloutCorrection.tis()}, ["srpo._rollout_inputs: nonzero"]),
    ],
    ids=str,
)
def test_a_loss_reads_once(options: dict[str, Any], others: list[str]) -> None:
    config = SRPOConfig(**options)
    inputs = with_leaves(inputs_of(config))
    if others:
        inputs |= {"old_log_probs": inputs["rollout_log_probs"] + 0.1}
    # Several chunks: none of them reads by itself.
    workspace_bytes = 6 * workspace_floor(33, 4, 2, "triton")
    call = partial(srpo_loss, **inputs, config=config, backend="triton", workspace_bytes=workspace_bytes)
    assert sorted(reads_of(call)) == sorted([ORDER, *others])


def test_tokens_that_are_given_are_looked_at() -> None:
    inputs = cast(head_inputs(0, (4, 6), 8, 33), torch.float32)
    support = torch.stack([inputs["target_ids"], (inputs["target_ids"] + 1) % 33], dim=-1)
    call = {name: inputs[name] for name in ("hidden", "weight", "target_ids", "mask")}
    lines = reads_of(partial(token_stats, **call, support_ids=support, backend="triton"))
    assert lines == [ORDER, "row_values.check_support: tolist"]
    config = SRPOConfig()
    rows = inputs_of(config) | {"sdpo_mask": None, "teacher_hidden": None, "teacher_weight": None, "teacher_bias": None}
    rows["support_ids"] = torch.stack([rows["target_ids"], (rows["target_ids"] + 1) % 33], dim=-1)
    lines = reads_of(partial(srpo_loss, **rows, config=config, backend="triton"))
    assert lines == ["prepare.flatten: index", "row_values.check_support: tolist", ORDER]


def test_several_teachers_read_which_rows_are_whose() -> None:
    config = SRPOConfig()
    inputs = with_leaves(inputs_of(config))
    heads = {name: [inputs[name]] * 2 for name in ("teacher_weight", "teacher_bias")}
    inputs |= heads | {"teacher_head_ids": torch.arange(4) % 2}
    lines = reads_of(partial(srpo_loss, **inputs, config=config, backend="triton"))
    others = ["prepare._head_ids: nonzero", "row_values.check_head_ids: tolist", "plan._sorted_by_head: tolist"]
    assert sorted(lines) == sorted([ORDER, *others])


def test_a_backward_reads_nothing() -> None:
    config = SRPOConfig()
    loss = srpo_loss(**with_leaves(inputs_of(config)), config=config, backend="triton").loss
    # On a CPU it asks whether the upstream gradient is 1.
    assert set(reads_of(loss.backward)) <= {"torch_rows.scaled: _local_scalar_dense"}


def test_a_teacher_of_the_routed_rows_and_packed_rows_read_more() -> None:
    config = SRPOConfig(loss_type="gspo")
    inputs = inputs_of(config)
    routed = inputs["sdpo_mask"]
    assert routed.ndim == 1
    part = inputs | {"teacher_hidden": inputs["teacher_hidden"][routed]}
    call = partial(srpo_loss, **part, config=config, backend="triton")
    assert sorted(reads_of(call)) == sorted([ORDER, "prepare._teacher_rows: _local_scalar_dense"])
    length = inputs["target_ids"].shape[1]
    packed = {
        name: x.flatten(0, 1) if torch.is_tensor(x) and x.shape[:2] == inputs["target_ids"].shape else x
        for name, x in inputs.items()
    }
    for name in ("advantages", "sdpo_mask"):
        if packed[name].ndim == 1 and len(packed[name]) == 4:
            packed[name] = packed[name].repeat_interleave(length)
    packed["sequence_ids"] = torch.arange(4).repeat_interleave(length)
    call = partial(srpo_loss, **packed, config=config, backend="triton")
    names = ["prepare._number_sequences: _unique2", "prepare._number_sequences: index"]
    assert sorted(reads_of(call)) == sorted([ORDER, *names])


def test_the_normalizers_of_a_whole_batch_are_checked_at_the_end() -> None:
    inputs = inputs_of(SRPOConfig())
    mask, routed = inputs["mask"], inputs["sdpo_mask"]
    valid = mask & (routed if routed.shape == mask.shape else routed[:, None])
    normalizers = Normalizers(mask.sum(), torch.tensor(-1.0), valid.sum(), torch.tensor(4))
    with pytest.warns(RuntimeWarning, match="dw_log_mean"):
        lines = reads_of(partial(srpo_loss, **inputs, normalizers=normalizers, backend="triton"))
    assert lines == [ORDER, "loss_op._forward: _local_scalar_dense"]


def test_statistics_read_once_each_way() -> None:
    inputs = with_leaves(cast(head_inputs(0, (4, 6), 8, 33, 5), torch.float32))
    stats: list[Any] = []
    assert reads_of(lambda: stats.append(token_stats(**inputs, backend="triton"))) == [ORDER]
    loss = stats[0].log_probs.sum() + stats[0].divergence.sum()
    assert reads_of(loss.backward) == ["stats.backward: nonzero"]


def test_a_teacher_s_statistics_read_nothing_without_a_mask() -> None:
    inputs = cast(head_inputs(0, (4, 6), 8, 33), torch.float32)
    call = partial(teacher_stats, inputs["hidden"], inputs["weight"], backend="triton")
    assert not reads_of(call)
    assert reads_of(partial(call, mask=inputs["mask"])) == [ORDER]


def test_an_objective_of_the_caller_s_is_checked_at_the_end() -> None:
    inputs = with_leaves(cast(head_inputs(0, (4, 6), 8, 33), torch.float32))
    names = ("hidden", "weight", "target_ids", "mask")
    call = partial(fused_loss, **{name: inputs[name] for name in names}, backend="triton")
    lines = reads_of(partial(call, objective=lambda rows: -rows.log_probs))
    assert lines == [ORDER, "objectives.check_values: _local_scalar_dense"]


def test_the_meter_knows_a_wait() -> None:
    ids = torch.tensor([[1, 2], [3, -1]])
    assert reads_of(partial(check_support, "support_ids", ids, 9)) == ["row_values.check_support: tolist"]
