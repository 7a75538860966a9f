"""One batch over ranks and micro-batches, in any split: normalizers, loss, metrics and gradients of the whole."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import reference
from examples.distributed.sequence_parallel import gspo_loss
from srpo_kernels import Normalizers, SRPOConfig, srpo_loss, teacher_stats
from srpo_kernels.distributed import gather_ranks
from srpo_kernels.losses.options import LOSS_TYPES
from srpo_kernels.losses.registry import POLICY_LOSSES
from tests.comparison import Results, assert_same, gradients, run_loss, with_leaves
from tests.inputs import Inputs, loss_inputs, take
from tests.processes import RankError, needs_gloo, run_ranks

pytestmark = needs_gloo

CONFIGS = [
    SRPOConfig(dw_beta=3.0),
    SRPOConfig(reduction="sequence", loss_type="gspo", dw_beta=0.5),
    SRPOConfig(reduction="constant", max_length=9, dw_beta=30.0, entropy_coef=0.1),
    SRPOConfig(loss_type="cispo", dw_beta=0.0, kl_coef=0.1),
]
# A token's loss needs nothing of the rest of its sequence.
ROW_CONFIGS = [
    SRPOConfig(loss_type=loss_type, reduction=reduction, max_length=9 if reduction == "constant" else None)
    for loss_type in LOSS_TYPES
    if not (POLICY_LOSSES[loss_type].whole_sequences or POLICY_LOSSES[loss_type].whole_batch)
    for reduction in ("token", "constant")
]


class Split(NamedTuple):
    """A batch, and which entries of its first dimension each rank's micro-batches have."""

    inputs: Inputs
    config: SRPOConfig
    parts: list[list[Tensor]]
    # Of a batch whose sequences are in pieces: how many they are, which no piece can count.
    sequence_count: int | None = None


def random_parts(labels: Tensor, world_size: int, accumulation: int, generator: torch.Generator) -> list[list[Tensor]]:
    """Each label's entries go to one micro-batch; some may get none."""
    cells = torch.randint(0, world_size * accumulation, (int(labels.max()) + 1,), generator=generator)[labels]
    parts = [(cells == cell).nonzero().squeeze(1) for cell in range(world_size * accumulation)]
    return [parts[rank * accumulation : (rank + 1) * accumulation] for rank in range(world_size)]


def splits(world_size: int) -> list[Split]:
    cases = []
    for seed in range(24):
        generator = torch.Generator().manual_seed(seed)
        accumulation, config = 1 + seed % 3, CONFIGS[seed % len(CONFIGS)]
        rows: tuple[int, ...] = (9, 5) if seed % 2 else (40,)
        inputs = loss_inputs(seed, rows, teacher_size=5)
        labels = torch.arange(9) if seed % 2 else torch.unique(inputs["sequence_ids"], return_inverse=True)[1]
        cases.append(Split(inputs, config, random_parts(labels, world_size, accumulation, generator)))
    # Rank 0 has every row to distill, and the last one none that is valid.
    inputs = loss_inputs(0, (9, 5), teacher_size=5) | {"sdpo_mask": torch.arange(9) < 3}
    inputs["mask"][8] = False
    others = torch.arange(3, 8).tensor_split(world_size - 2) if world_size > 2 else []
    first = torch.arange(3 if world_size > 2 else 8)
    cases.append(Split(inputs, CONFIGS[0], [[first], *([x] for x in others), [torch.tensor([8])]]))
    return cases


def row_splits(world_size: int) -> list[Split]:
    cases = []
    for seed, config in enumerate(ROW_CONFIGS):
        inputs = loss_inputs(seed, (40,), teacher_size=5)
        parts = random_parts(torch.arange(40), world_size, 1, torch.Generator().manual_seed(seed))
        count = len(torch.unique(inputs["sequence_ids"][inputs["mask"]]))
        cases.append(Split(inputs, config, parts, count))
    return cases


def normalizers_of(split: Split, parts: list[Inputs]) -> Normalizers:
    each = []
    for part in parts:
        teacher = teacher_stats(part["teacher_hidden"], part["teacher_weight"], teacher_bias=part["teacher_bias"])
        sequence_ids = part.get("sequence_ids")
        masks = part["mask"], part["sdpo_mask"]
        each.append(Normalizers.from_batch(*masks, teacher.entropy, split.config.dw_beta, sequence_ids))
    reduced = each[0].merge(*each[1:]).all_reduce()
    if split.sequence_count is None:
        return reduced
    return reduced._replace(sequence_count=torch.tensor(split.sequence_count))


def run_parts(split: Split, rank: int) -> tuple[Normalizers, list[Results]]:
    parts = [take(split.inputs, index) for index in split.parts[rank]]
    normalizers = normalizers_of(split, parts)
    options = {"normalizers": normalizers, "config": split.config}
    return normalizers, [run_loss(srpo_loss, part, **options) for part in parts]


def spread_sequences(rank: int) -> Results:
    """The loss and gradients of the recipe for GSPO, each rank with half of the positions."""
    inputs = with_leaves(gspo_inputs(), ("hidden", "weight"))
    mine = {name: inputs[name].chunk(2, 1)[rank] for name in ("hidden", "target_ids", "mask", "old_log_probs")}
    loss = gspo_loss(weight=inputs["weight"], advantages=inputs["advantages"], **mine)
    return {"loss": loss.detach()} | gradients(loss, inputs)


def gspo_inputs() -> Inputs:
    names = ("hidden", "weight", "target_ids", "mask", "advantages", "old_log_probs")
    return {name: x for name, x in loss_inputs(0, (5, 6)).items() if name in names}


def run_splits(rank: int, cases: list[Split]) -> tuple[list[list[Results]], Results]:
    results = []
    for split in cases:
        normalizers, parts = run_parts(split, rank)
        everywhere = gather_ranks(torch.stack([x.double() for x in normalizers]))
        assert (everywhere == everywhere[0]).all(), "normalizers differ between ranks"
        again, parts_again = run_parts(split, rank)
        assert again == normalizers
        for part, part_again in zip(parts, parts_again, strict=True):
            assert_same(part_again, part, 0.0)
        results.append(parts)
    return results, spread_sequences(rank) if len(everywhere) == 2 else {}


def assert_whole(split: Split, ranks: list[list[Results]]) -> None:
    """What the parts have in rows lies at their rows; everything else adds up."""
    expected = run_loss(reference.srpo_loss, split.inputs, config=split.config)
    actual = {name: torch.zeros_like(x) for name, x in expected.items()}
    for indices, results in zip(split.parts, ranks, strict=True):
        for index, result in zip(indices, results, strict=True):
            for name, value in result.items():
                if name in ("log_probs", "grad hidden"):
                    actual[name][index] = value
                else:
                    actual[name] += value
    assert_same(actual, expected, 1e-10)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_split_gives_the_whole(world_size: int) -> None:
    cases = splits(world_size) + row_splits(world_size)
    assert any(len(part) == 0 for split in cases for parts in split.parts for part in parts)
    ranks = run_ranks(run_splits, world_size, cases, timeout_seconds=300)
    for i, split in enumerate(cases):
        assert_whole(split, [results[i] for results, _ in ranks])
    if world_size == 2:
        first, second = (spread for _, spread in ranks)
        expected = run_loss(reference.srpo_loss, gspo_inputs(), config=SRPOConfig(loss_type="gspo"))
        # A rank's gradient of the hidden states is that of its positions, and 0 elsewhere.
        assert_same(
            {name: first[name] + second[name] for name in first}, {name: expected[name] for name in first}, 1e-12
        )


def fail_before_the_collective(rank: int) -> Normalizers:
    mask = torch.ones(2, 3, dtype=torch.bool)
    # Rank 1 has rows to distill, and no entropies of its teacher.
    return Normalizers.from_batch(mask, mask if rank == 1 else None, None, 1.0).all_reduce()


def test_a_rank_that_fails_is_no_deadlock_for_the_others() -> None:
    with pytest.raises(RankError) as failure:
        run_ranks(fail_before_the_collective, 2, timeout_seconds=60)
    assert "teacher_entropy is required" in failure.value.tracebacks[1]
    assert "all_gather" in failure.value.tracebacks[0]
