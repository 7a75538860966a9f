"""Any cut of a step, of its rows over ranks and micro-batches and of the vocabulary over shards, gives the whole."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed import ProcessGroup

import reference
from srpo_kernels import Normalizers, SRPOConfig, srpo_loss, teacher_stats
from tests.comparison import Results, assert_same, run_loss
from tests.distributed.test_vocab_parallel import assembled, shard_of
from tests.inputs import SHARED, Inputs, loss_inputs, take, teacher_transform_of
from tests.processes import needs_gloo, run_ranks
from tests.strategies import configs, workspaces

pytestmark = needs_gloo


class Part(NamedTuple):
    """A micro-batch of a rank, and which of the whole batch's rows it has."""

    inputs: Inputs
    rows: Tensor


class Step(NamedTuple):
    """A batch, the sizes of the vocabulary's shards, and the micro-batches of each group of shards."""

    inputs: Inputs
    config: SRPOConfig
    shards: list[int]
    parts: list[list[Part]]
    # Sequences are in pieces: how many they are, which no piece can count.
    sequence_count: int | None
    workspace_bytes: int | None


@st.composite
def steps(draw: st.DrawFn, ranks: int) -> Step:
    """Whole sequences of ``[B, T]`` or packed rows anywhere, or pieces of them."""

    def assign(count: int, cells: int) -> Tensor:
        return torch.tensor(draw(st.lists(st.integers(0, cells - 1), min_size=count, max_size=count)), dtype=torch.long)

    config, accumulation, in_pieces = draw(configs(whole_batch=False)), draw(st.integers(1, 3)), draw(st.booleans())
    if in_pieces and draw(st.booleans()):
        # Only a sequence with an advantage moves: one rank's rows may have none of it.
        config = replace(config, loss_type="gspo", loss_options={}, kl_coef=0.0, entropy_coef=0.0)
    shards = draw(st.sampled_from([n for n in (1, 2, 4) if ranks % n == 0]))
    replicas = ranks // shards
    rows, vocab_size = draw(st.sampled_from([(7, 5), (3, 4), (29,), (5,)])), draw(st.sampled_from([33, 7, 129]))
    inputs = loss_inputs(draw(st.integers(0, 2**31)), rows, 4, vocab_size, teacher_size=5, config=config)
    inputs["sdpo_mask"] = assign(rows[0], 2) > 0
    inputs["mask"] &= torch.rand(rows, generator=torch.Generator().manual_seed(0)) < draw(st.sampled_from([1.0, 0.4]))
    packed = len(rows) == 1
    sequences = torch.unique(inputs["sequence_ids"], return_inverse=True)[1] if packed else torch.arange(rows[0])
    count = len(torch.unique((sequences if packed else sequences[:, None].expand(rows))[inputs["mask"]]))

    micro_batch = assign(len(sequences), accumulation)[sequences]
    replica = assign(len(sequences), replicas)[sequences]
    if in_pieces and packed:
        replica = assign(rows[0], replicas)
    ends = sorted(draw(st.lists(st.integers(0, rows[-1]), min_size=replicas - 1, max_size=replicas - 1)))
    parts = []
    for here, columns in enumerate(pairwise([0, *ends, rows[-1]])):
        if in_pieces and not packed:
            parts.append([part_of(inputs, micro_batch == i, slice(*columns)) for i in range(accumulation)])
        else:
            parts.append([part_of(inputs, (micro_batch == i) & (replica == here)) for i in range(accumulation)])
    bounds = draw(st.sets(st.integers(1, vocab_size - 1), min_size=shards - 1, max_size=shards - 1))
    sizes = [stop - start for start, stop in pairwise([0, *sorted(bounds), vocab_size])]
    return Step(inputs, config, sizes, parts, count if in_pieces else None, draw(workspaces(vocab_size)))


def part_of(inputs: Inputs, chosen: Tensor, columns: slice | None = None) -> Part:
    """The chosen entries of the first dimension, and of the second some columns."""
    shape = inputs["target_ids"].shape
    part = take(inputs | {"rows": torch.arange(shape.numel()).view(shape)}, chosen.nonzero().squeeze(1))
    if columns is not None:
        part = {k: x if k in SHARED or x is None or x.ndim < 2 else x[:, columns] for k, x in part.items()}
    return Part(part, part.pop("rows").flatten())


def normalizers_of(step: Step, parts: list[Inputs], vocabulary: ProcessGroup | None, data: ProcessGroup) -> Normalizers:
    each = []
    for part in parts:
        teacher = {name: part[name] for name in ("teacher_hidden", "teacher_weight", "teacher_bias")}
        entropy = teacher_stats(**teacher, **teacher_transform_of(step.config), vocab_parallel_group=vocabulary).entropy
        sequence_ids = part.get("sequence_ids")
        each.append(Normalizers.from_batch(part["mask"], part["sdpo_mask"], entropy, step.config.dw_beta, sequence_ids))
    whole = each[0].merge(*each[1:]).all_reduce(data)
    if step.sequence_count is None:
        return whole
    return whole._replace(sequence_count=torch.tensor(step.sequence_count))


def run_steps(rank: int, cases: list[Step]) -> list[list[Results]]:
    """The results of this rank's micro-batches; ranks of a group of shards are neighbours."""
    ranks = range(dist.get_world_size())
    groups: dict[int, tuple[ProcessGroup, ProcessGroup]] = {}
    for shards in sorted({len(step.shards) for step in cases}):
        vocabularies = [dist.new_group([*ranks[i : i + shards]]) for i in ranks[::shards]]
        replicas = [dist.new_group([*ranks[i::shards]]) for i in range(shards)]
        groups[shards] = vocabularies[rank // shards], replicas[rank % shards]
    results = []
    for step in cases:
        shards = len(step.shards)
        vocabulary, data = groups[shards]
        parts = [shard_of(part.inputs, step.shards, rank % shards) for part in step.parts[rank // shards]]
        options = {
            "normalizers": normalizers_of(step, parts, vocabulary if shards > 1 else None, data),
            "vocab_parallel_group": vocabulary if shards > 1 else None,
            "sequence_parallel_group": None if step.sequence_count is None else data,
            "config": step.config,
            "workspace_bytes": step.workspace_bytes,
        }
        results.append([run_loss(srpo_loss, part, **options) for part in parts])
    return results


def assert_whole(step: Step, of_ranks: list[list[Results]]) -> None:
    """What the parts have in rows lies at their rows; everything else adds up."""
    expected = run_loss(reference.srpo_loss, step.inputs, config=step.config)
    actual = {name: torch.zeros_like(x) for name, x in expected.items()}
    shards, dims = len(step.shards), step.inputs["target_ids"].ndim
    for replica, parts in enumerate(step.parts):
        results = assembled(of_ranks[replica * shards : (replica + 1) * shards])
        for part, result in zip(parts, results, strict=True):
            for name, value in result.items():
                if name in ("log_probs", "grad hidden"):
                    actual[name].flatten(0, dims - 1)[part.rows] = value.flatten(0, dims - 1)
                else:
                    actual[name] += value
    assert_same(actual, expected, 1e-9)


@pytest.mark.parametrize(("ranks", "count"), [(2, 80), (4, 40)])
def test_any_cut_gives_the_whole(ranks: int, count: int) -> None:
    cases: list[Step] = []

    @settings(max_examples=count, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(steps(ranks))
    def collect(step: Step) -> None:
        cases.append(step)

    collect()
    # A rank without a row, one without a row to distill beside others that have some, and a shard of one id.
    each = [[part.inputs for part in parts] for step in cases for parts in step.parts]
    assert any(not part["mask"].any() for parts in each for part in parts)
    assert any(not part["sdpo_mask"].any() and part["mask"].any() for parts in each for part in parts)
    assert any(1 in step.shards for step in cases)
    ranks_results = run_ranks(run_steps, ranks, cases, timeout_seconds=300)
    for i, step in enumerate(cases):
        assert_whole(step, [results[i] for results in ranks_results])
