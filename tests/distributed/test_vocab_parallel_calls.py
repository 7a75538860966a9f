"""``vocab_parallel_group``: who refuses what, and the other ways to call."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

import reference
from srpo_kernels import (
    LogitTransform,
    Normalizers,
    SRPOConfig,
    SRPOLoss,
    srpo_loss,
    teacher_stats,
    token_stats,
)
from srpo_kernels.engine.memory import RowMemory
from srpo_kernels.losses.options import DistillationMode
from srpo_kernels.rows import torch_rows
from srpo_kernels.rows.passes import RowPasses
from srpo_kernels.rows.vocabulary import Vocabulary
from tests.comparison import Results, assert_as_accurate, assert_same, run_loss, run_stats
from tests.distributed.test_vocab_parallel import assembled, shard_of
from tests.inputs import Inputs, cast, head_inputs, loss_inputs, workspace_floor
from tests.parity import coefficients
from tests.processes import RankError, interpreted, needs_gloo, run_ranks

pytestmark = needs_gloo

SIZES = [20, 13]


def group() -> dict[str, Any]:
    return {"vocab_parallel_group": dist.group.WORLD}


# Other ways to call.


def compile_everything(rank: int) -> list[Results]:
    """The loss and the statistics, compiled and not."""
    inputs = shard_of(cast(loss_inputs(0, (17,), 8, 33), torch.float32), SIZES, rank) | group()
    loss = run_loss(torch.compile(SRPOLoss(), backend="aot_eager", fullgraph=True), inputs)
    assert_same(loss, run_loss(srpo_loss, inputs), 0.0)

    inputs = shard_of(cast(head_inputs(0, (17,), 8, 33), torch.float32), SIZES, rank) | group()
    compiled = torch.compile(token_stats, backend="aot_eager", fullgraph=True)
    stats = run_stats(compiled, inputs, coefficients(inputs))
    assert_same(stats, run_stats(token_stats, inputs, coefficients(inputs)), 0.0)
    return [loss, stats]


def test_compiled_calls_are_eager_ones() -> None:
    assembled(run_ranks(compile_everything, 2))


def teach(rank: int, backend: str, engine: str) -> list[Results]:
    import tests.conftest  # noqa: F401  Triton's interpreter as the other tests have it.

    inputs = shard_of(tiled_inputs(), SIZES, rank)
    options = {"backend": backend, "engine": engine, "softcap": 5.0, **group()}
    teacher = {name: inputs[name] for name in ("teacher_hidden", "teacher_weight", "teacher_bias", "mask")}
    results = [teacher_stats(**teacher, **options)._asdict()]
    with torch.no_grad():
        for divergence in ("forward_kl", "reverse_kl"):
            results.append(token_stats(**inputs, divergence=divergence, **options)._asdict())
    return results


def tiled_inputs() -> Inputs:
    return cast(head_inputs(0, (4, 6), 8, 33, teacher_size=5, spread=2.0), torch.float32)


@pytest.mark.parametrize(
    ("backend", "engine"),
    [("torch", "rows"), *(pytest.param("triton", engine, marks=interpreted) for engine in ("rows", "tile"))],
)
def test_statistics_without_gradient(backend: str, engine: str) -> None:
    inputs = tiled_inputs()
    teacher, *of_divergences = assembled(run_ranks(teach, 2, backend, engine))
    for actual, divergence in zip(of_divergences, ("forward_kl", "reverse_kl"), strict=True):
        naive, exact = (
            reference.token_stats(**x, divergence=divergence, softcap=5.0)._asdict()
            for x in (inputs, cast(inputs, torch.float64))
        )
        assert_as_accurate(actual, naive, exact)
    alone = teacher_stats(
        inputs["teacher_hidden"],
        inputs["teacher_weight"],
        teacher_bias=inputs["teacher_bias"],
        mask=inputs["mask"],
        softcap=5.0,
    )
    assert_same(teacher, alone._asdict(), 1e-6)


def several_teachers() -> Inputs:
    """Two heads of their own, and the student's between them."""
    inputs = loss_inputs(0, (6, 5))
    own = [loss_inputs(seed, (6, 5), teacher_size=8) for seed in (1, 2)]
    heads = {name: [own[0][name], None, own[1][name]] for name in ("teacher_weight", "teacher_bias")}
    return inputs | heads | {"teacher_head_ids": torch.arange(6) % 3}


def distill_from_several(rank: int, config: SRPOConfig) -> list[Results]:
    inputs = several_teachers()
    heads = {
        name: [None if x is None else x.split(SIZES)[rank] for x in inputs.pop(name)]
        for name in ("teacher_weight", "teacher_bias")
    }
    return [run_loss(srpo_loss, shard_of(inputs, SIZES, rank) | heads | group(), config=config)]


@pytest.mark.parametrize("mode", ["full", "topk", "sampled"])
def test_several_teachers_with_a_transform_of_their_own(mode: DistillationMode) -> None:
    config = SRPOConfig(distillation_mode=mode, topk=3, softcap=5.0, teacher_transform=LogitTransform(0.8, 1.5))
    (actual,) = assembled(run_ranks(distill_from_several, 2, config))
    assert_same(actual, run_loss(reference.srpo_loss, several_teachers(), config=config), 1e-9)


def part_of(replica: int) -> Inputs:
    """Two data-parallel replicas have 2 and 4 of the batch's sequences."""
    inputs, sequences = loss_inputs(0, (6, 5), teacher_size=5), [slice(0, 2), slice(2, 6)][replica]
    shared = ("weight", "bias", "teacher_weight", "teacher_bias")
    return {name: x if name in shared else x[sequences] for name, x in inputs.items()}


def train_in_groups(rank: int) -> Results:
    """Ranks 0 and 1 hold the vocabulary for one part of the batch, ranks 2 and 3 for the other."""
    vocabulary = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    data = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    inputs = shard_of(part_of(rank // 2), SIZES, rank % 2)
    teacher = {name: inputs[name] for name in ("teacher_hidden", "teacher_weight", "teacher_bias")}
    entropy = teacher_stats(**teacher, vocab_parallel_group=vocabulary).entropy
    normalizers = Normalizers.from_batch(inputs["mask"], inputs["sdpo_mask"], entropy, 1.0).all_reduce(data)
    results = run_loss(srpo_loss, inputs, normalizers=normalizers, vocab_parallel_group=vocabulary)
    for name in ("loss", "grad weight", "grad bias"):
        dist.all_reduce(results[name], group=data)
    return {name: results[name] for name in ("loss", "grad hidden", "grad weight", "grad bias")}


def test_groups_of_shards_beside_data_parallelism() -> None:
    of_ranks = run_ranks(train_in_groups, 4)
    expected = run_loss(srpo_loss, loss_inputs(0, (6, 5), teacher_size=5))
    actual = {
        "loss": of_ranks[0]["loss"],
        "grad hidden": torch.cat([of_ranks[0]["grad hidden"], of_ranks[2]["grad hidden"]]),
        "grad weight": torch.cat([of_ranks[0]["grad weight"], of_ranks[1]["grad weight"]]),
        "grad bias": torch.cat([of_ranks[2]["grad bias"], of_ranks[3]["grad bias"]]),
    }
    assert_same(actual, {name: expected[name] for name in actual}, 1e-10)


def test_a_shard_takes_the_memory_of_whole_rows_for_more_of_them() -> None:
    weight = torch.empty(16, 8, device="meta")
    shard = RowMemory.of(weight, torch.float32, RowPasses(torch_rows, Vocabulary(64, 16, 16, 16, None)))
    whole = RowMemory.of(weight, torch.float32, RowPasses(torch_rows, Vocabulary.whole(16)))
    assert shard.capacity(2, None) == 4 * whole.capacity(2, None)


# Who refuses what.

# What rank 1 does differently, and what its error says; None: what the others' says.
BAD_ON_ONE_RANK: list[tuple[Inputs, type[Exception], str | None]] = [
    ({"weight": torch.ones(13, 7).double()}, ValueError, "hidden and weight must agree"),
    ({"bias": torch.ones(12).double()}, ValueError, "bias must have shape"),
    ({"teacher_weight": torch.ones(12, 5).double(), "teacher_bias": None}, ValueError, "must have one vocabulary"),
    ({"weight": torch.ones(13, 8).int()}, TypeError, "weight must be float32"),
    ({"hidden": None}, TypeError, "hidden must be a torch.Tensor"),
    ({"hidden": torch.ones(4, 6, 8, device="meta")}, ValueError, "hidden must be on the device that has its data"),
    ({"mask": torch.ones(4, 6)}, TypeError, "mask must be bool"),
    ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ({"weight": torch.ones(13, 8)}, ValueError, None),
    ({"hidden": torch.ones(4, 6, 8)}, ValueError, None),
    ({"is_weights": None}, ValueError, None),
    ({"config": SRPOConfig(temperature=0.7)}, ValueError, None),
    ({"workspace_bytes": 1 << 20}, ValueError, None),
]
# What every rank does, and sees to be wrong only with the others' shards known.
BAD_ON_ALL_RANKS: list[tuple[Inputs, str]] = [
    ({"target_ids": torch.full((4, 6), 33)}, r"target_ids must lie in \[0, 33\)"),
    ({"workspace_bytes": workspace_floor(20, 8, 2) - 1}, "workspace_bytes must be at least"),
]
OTHERS_REFUSED = r"ranks \[1\] of vocab_parallel_group have refused their arguments"
OTHERS_DIFFER = r"all ranks of vocab_parallel_group must be called with the same arguments.*ranks \[1\] differ"


def refuse(rank: int) -> None:
    inputs = shard_of(loss_inputs(0, (4, 6), teacher_size=5), SIZES, rank) | group()
    srpo_loss(**inputs)
    for changes, error, message in BAD_ON_ONE_RANK:
        expected = OTHERS_REFUSED if rank == 0 and message else message or OTHERS_DIFFER
        with pytest.raises(error if rank else ValueError, match=expected):
            srpo_loss(**inputs | (changes if rank == 1 else {}))
    for changes, message in BAD_ON_ALL_RANKS:
        with pytest.raises(ValueError, match=message):
            srpo_loss(**inputs | changes)
    statistics = {name: inputs[name] for name in ("hidden", "weight", "target_ids", "vocab_parallel_group")}
    with pytest.raises(ValueError, match="temperature must be" if rank else OTHERS_REFUSED):
        token_stats(**statistics, temperature=-1.0 if rank else 1.0)
    with pytest.raises(ValueError, match="engine must be" if rank else OTHERS_REFUSED):
        teacher_stats(inputs["hidden"], inputs["weight"], engine="file" if rank else "rows", **group())
    # The group is as good as new.
    srpo_loss(**inputs)


def test_what_one_rank_refuses_all_ranks_refuse() -> None:
    run_ranks(refuse, 2)


def die(rank: int) -> None:
    inputs = shard_of(loss_inputs(0, (4, 6)), SIZES, rank)
    if rank == 1:
        # After the opening, before the first sums.
        torch_rows.sums = lambda *_, **__: os._exit(3)  # type: ignore[assignment]
    srpo_loss(**inputs, **group())


def test_a_rank_that_dies_within_a_call_fails_the_others() -> None:
    with pytest.raises(RankError) as error:
        run_ranks(die, 2, timeout_seconds=60)
    assert "srpo_loss" in error.value.tracebacks[0]
    assert "exit code 3" in error.value.tracebacks[1]
