"""``fused_loss`` over ranks: shards of the vocabulary, and parts of sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import srpo_kernels as sk
from tests.distributed.test_vocab_parallel import assembled, shard_of
from tests.inputs import head_inputs, random_support, with_given_topk
from tests.processes import needs_gloo, run_ranks

pytestmark = needs_gloo

SIZES = [13, 20]
Results = dict[str, Tensor]


def everything(rows: sk.ObjectiveRows) -> Tensor:
    loss = -(rows.log_probs - rows.old_log_probs).exp() * rows.advantages - 0.1 * rows.entropy
    return loss + rows.divergence * rows.teacher_entropy + (rows.log_probs - rows.teacher_log_probs) ** 2


def by_sequence(rows: sk.ObjectiveRows) -> Tensor:
    return -rows.sequence_mean(rows.log_probs - rows.old_log_probs).exp() * rows.advantages + rows.divergence


def batch() -> tuple[dict[str, Any], dict[str, Tensor], Tensor, Tensor]:
    inputs = head_inputs(3, (23,), 8, 33, teacher_size=5)
    generator = torch.Generator().manual_seed(0)
    extra = {
        "advantages": torch.randn(23, dtype=torch.float64, generator=generator),
        "old_log_probs": torch.randn(23, dtype=torch.float64, generator=generator) - 3.0,
    }
    has = torch.rand(23, generator=generator) < 0.5
    return inputs, extra, has, torch.randint(0, 4, (23,), generator=generator)


def run(inputs: dict[str, Any], extra: dict[str, Tensor], objective: Any, **options: Any) -> Results:
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")}
    out = sk.fused_loss(**inputs | leaves, objective=objective, inputs=extra, **options)
    grads = torch.autograd.grad(out.loss, list(leaves.values()))
    results = {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return results | {"loss": out.loss.detach(), "log_probs": out.log_probs, "losses": out.losses}


def shards(rank: int) -> list[Results]:
    inputs, extra, has, ids = batch()
    group = {"vocab_parallel_group": dist.group.WORLD, "teacher_mask": has}
    own = shard_of(inputs, SIZES, rank)
    whole = {"sequence_ids": ids, "whole_sequences": True}
    return [run(own, extra, everything, **group), run(own, extra, by_sequence, **group, **whole)]


def test_shards_of_the_vocabulary() -> None:
    inputs, extra, has, ids = batch()
    actual = assembled(run_ranks(shards, 2))
    expected = [
        run(inputs, extra, everything, teacher_mask=has),
        run(inputs, extra, by_sequence, teacher_mask=has, sequence_ids=ids, whole_sequences=True),
    ]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


def of_a_few_tokens(vocab_size: int) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """A support, and a teacher that is its likeliest tokens, without a tail where the vocabulary is large."""
    _, extra, has, _ = batch()
    config = sk.SRPOConfig(distillation_mode="topk", topk_of="teacher", add_tail=vocab_size == 33, softcap=9.0)
    inputs = with_given_topk(head_inputs(3, (23,), 8, vocab_size, teacher_size=5), config, 4)
    inputs["support_ids"] = random_support(inputs["target_ids"], vocab_size, 5)
    return inputs, extra, {"teacher_mask": has, "config": config}


def few(rows: sk.ObjectiveRows) -> Tensor:
    loss = -(rows.log_probs - rows.old_log_probs).exp() * rows.advantages - 0.1 * rows.entropy
    return loss + rows.divergence * rows.teacher_entropy


def few_and_all(rows: sk.ObjectiveRows) -> Tensor:
    return few(rows) + rows.full_log_probs * rows.full_entropy + 0.1 * rows.logsumexp


def shards_of_a_few(rank: int) -> list[Results]:
    group = {"vocab_parallel_group": dist.group.WORLD}
    results = []
    for vocab_size, objective in FEW:
        inputs, extra, options = of_a_few_tokens(vocab_size)
        own = shard_of(inputs, [vocab_size // 3, vocab_size - vocab_size // 3], rank)
        results.append(run(own, extra, objective, **options, **group))
    return results


# The last ones by columns of the head.
FEW = [(33, few), (33, few_and_all), (600, few_and_all), (600, few)]


def test_shards_of_a_few_tokens() -> None:
    for actual, (vocab_size, objective) in zip(assembled(run_ranks(shards_of_a_few, 2)), FEW, strict=True):
        inputs, extra, options = of_a_few_tokens(vocab_size)
        torch.testing.assert_close(actual, run(inputs, extra, objective, **options), rtol=1e-10, atol=1e-10)


def parts(rank: int, ends: tuple[int, ...]) -> Results:
    inputs, extra, has, ids = batch()
    rows = slice(*(0, *ends)[rank : rank + 2])
    own = {name: x[rows] if x is not None and len(x) == 23 else x for name, x in inputs.items()}
    return run(
        own,
        {name: x[rows] for name, x in extra.items()},
        by_sequence,
        teacher_mask=has[rows],
        sequence_ids=ids[rows],
        whole_sequences=True,
        sequence_parallel_group=dist.group.WORLD,
    )


@pytest.mark.parametrize("ends", [(9, 23), (23, 23)])
def test_parts_of_sequences(ends: tuple[int, ...]) -> None:
    inputs, extra, has, ids = batch()
    expected = run(inputs, extra, by_sequence, teacher_mask=has, sequence_ids=ids, whole_sequences=True)
    first, second = run_ranks(parts, 2, ends)
    for name, value in expected.items():
        joined = (
            torch.cat([first[name], second[name]]) if value.ndim and len(value) == 23 else first[name] + second[name]
        )
        torch.testing.assert_close(joined, value, rtol=1e-10, atol=1e-10)


def refuse(rank: int) -> None:
    inputs, extra, has, _ = batch()
    own = shard_of(inputs, SIZES, rank) | {"teacher_mask": has, "vocab_parallel_group": dist.group.WORLD}
    with pytest.raises(ValueError, match="differ from rank 0's"):
        sk.fused_loss(**own, objective=everything if rank else by_sequence, inputs=extra)
    with pytest.raises(ValueError, match="objective must be" if rank else "have refused their arguments"):
        sk.fused_loss(**own, objective="nobody" if rank else everything, inputs=extra)


def test_what_one_rank_refuses_all_ranks_refuse() -> None:
    run_ranks(refuse, 2)
