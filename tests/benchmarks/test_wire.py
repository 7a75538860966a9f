"""What ``vocab_parallel_group`` sends is what ``python -m benchmarks wire`` says, and so does the document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.wire import Traffic, loss_traffic, table
from srpo_kernels import SRPOConfig, srpo_loss, token_stats
from srpo_kernels.engine.memory import RowMemory
from srpo_kernels.rows import torch_rows
from srpo_kernels.rows.passes import RowPasses
from srpo_kernels.rows.vocabulary import Vocabulary
from tests.comparison import gradients, run_loss, with_leaves
from tests.distributed.test_vocab_parallel import shard_of
from tests.inputs import Inputs, cast, head_inputs, loss_inputs, policy_rows, workspace_floor
from tests.processes import needs_gloo, run_ranks
from tests.wire import Wire
from tools.documents import markdown_table

pytestmark = needs_gloo

SIZES = [20, 13]


def group() -> dict[str, Any]:
    return {"vocab_parallel_group": dist.group.WORLD}


def traffic(wire: Wire) -> Traffic:
    return Traffic(len(wire.gathered), sum(wire.gathered), len(wire.reduced), sum(wire.reduced))


EXCHANGES: list[tuple[str, str]] = [
    ("full", "jsd"),
    ("full", "forward_kl"),
    ("full", "reverse_kl"),
    ("full", "skew_forward_kl"),
    ("full", "skew_reverse_kl"),
    ("topk", "jsd"),
    ("sampled", "jsd"),
]


def batch() -> Inputs:
    return cast(loss_inputs(0, (6, 7), 8, 33, teacher_size=5), torch.float32) | {"advantages": torch.ones(6)}


def count_losses(rank: int, workspace_bytes: int) -> dict[str, Traffic]:
    inputs = shard_of(batch(), SIZES, rank)
    counts = {}

    def count(name: str, config: SRPOConfig, leaves: tuple[str, ...] = ("hidden", "weight"), **options: Any) -> None:
        with Wire() as wire:
            run_loss(srpo_loss, inputs, leaves, config=config, **options, **group())
        counts[name] = traffic(wire)

    for mode, divergence in EXCHANGES:
        count(f"{mode} {divergence}", SRPOConfig(distillation_mode=mode, divergence=divergence, topk=3))
    count("no gradient of hidden states", SRPOConfig(), ("weight",))
    count("chunks", SRPOConfig(), workspace_bytes=workspace_bytes)
    inputs["mask"] = torch.zeros(6, 7) > 0
    count("nothing valid", SRPOConfig())
    return counts


def test_collectives_and_bytes_of_a_loss_are_the_documented_ones() -> None:
    inputs = batch()
    policy = int(policy_rows(inputs).sum())
    distilled = int(inputs["mask"].sum()) - policy
    assert min(policy, distilled) > 0
    workspace_bytes = 2 * workspace_floor(20, 4, 2)
    first, second = run_ranks(count_losses, 2, workspace_bytes)
    assert first == second
    for mode, divergence in EXCHANGES:
        expected = loss_traffic([policy], [distilled], 8, mode=mode, divergence=divergence, topk=3, shared=True)
        assert first[f"{mode} {divergence}"] == expected
        # The opening and two exchanges of sums, and one of dX.
        assert expected.gathers <= 3
        assert expected.reductions == 1
    # A sum of each row's dlogits, which says whether they are finite.
    assert first["no gradient of hidden states"] == loss_traffic([policy], [distilled], 1, shared=True)
    assert first["nothing valid"] == loss_traffic([], [], 8)
    memory = RowMemory.of(torch.ones(20, 8), torch.float32, RowPasses(torch_rows, Vocabulary.whole(20)))
    chunks = [-(-n // memory.capacity(k, workspace_bytes)) for n, k in ((policy, 1), (distilled, 2))]
    assert max(chunks) > 1
    assert first["chunks"].gathers == 1 + chunks[0] + 2 * chunks[1]
    assert first["chunks"].gathered_bytes == loss_traffic([policy], [distilled], 8).gathered_bytes


def count_statistics(rank: int) -> list[Traffic]:
    inputs = with_leaves(shard_of(cast(head_inputs(0, (17,), 8, 33), torch.float32), SIZES, rank) | {"mask": None})
    with Wire() as forward:
        out = token_stats(**inputs, **group())
    with Wire() as backward:
        gradients(out.log_probs.sum() + out.entropy.sum(), inputs)
    return [traffic(forward), traffic(backward)]


def test_collectives_and_bytes_of_statistics_are_the_documented_ones() -> None:
    forward, backward = run_ranks(count_statistics, 2)[0]
    assert forward == Traffic(3, 24 + 17 * 13 * 4, 0, 0)
    assert backward == Traffic(3, 24 + 17 * 13 * 4, 1, 17 * 8 * 4)


def test_the_table_in_the_documentation_is_what_the_formulas_say() -> None:
    document = Path(__file__).parents[2] / "docs" / "vocabulary_parallel.md"
    assert markdown_table(*table()) in document.read_text()
