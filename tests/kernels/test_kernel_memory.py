"""Every kernel under the sanitizer: ragged tails, strided and offset rows, rows beyond 2^31 elements, foreign ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from srpo_kernels.kernels import launch
from srpo_kernels.kernels import rows as kernel_rows
from srpo_kernels.kernels.tiles import Projection, tile_stats
from srpo_kernels.rows.coefficients import coefficients
from srpo_kernels.rows.contract import RowGradients, Statistics
from srpo_kernels.rows.mixture import MIXTURE_DIVERGENCES
from srpo_kernels.rows.passes import Request, RowPasses
from srpo_kernels.rows.spec import DIVERGENCES, LogitTransform, RowSpec
from srpo_kernels.rows.vocabulary import Vocabulary
from tools.interpreter.sanitizer import sanitize, sparse_rows

pytestmark = pytest.mark.interpreter

ROWS = 3
# A row stride whose third row begins beyond 2^31 elements.
FAR = 2**30 + 16
SOFTCAPS = pytest.mark.parametrize("softcap", [None, 5.0])
# Of the teacher: the student's, or one of its own.
OWN = pytest.mark.parametrize("own", [None, LogitTransform(2.0)], ids=["", "own teacher"])
# Blocks of 64 columns of one model and 32 of two: less than a block, whole blocks, whole blocks and a tail.
VOCABULARIES = pytest.mark.parametrize("vocab_size", [7, 128, 129])
VOCABULARIES_OF_TWO = pytest.mark.parametrize("vocab_size", [7, 64, 65])

Rows = Callable[[int], Tensor]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_ROW_LANES", 16)


def padded(vocab_size: int) -> Tensor:
    """Rows with an offset before them and gaps between them, as the engine lays them out."""
    return torch.randn(ROWS + 1, vocab_size + 16 - vocab_size % 16)[1:, :vocab_size]


def far_apart(vocab_size: int) -> Tensor:
    rows = sparse_rows(ROWS, vocab_size, FAR, torch.float32)
    return rows.copy_(torch.randn(ROWS, vocab_size))


LAYOUTS = pytest.mark.parametrize("rows", [padded, far_apart])


def passes(vocab_size: int) -> RowPasses:
    return RowPasses(kernel_rows, Vocabulary.whole(vocab_size))


def place(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Where dlogits go: over the logits, or into rows of another dtype."""
    if dtype == logits.dtype:
        return logits
    return torch.empty_strided(logits.shape, logits.stride(), dtype=dtype)


def capped(softcap: float | None, **options: Any) -> RowSpec:
    return RowSpec(LogitTransform(softcap=softcap), **options)


def target_ids(vocab_size: int) -> Tensor:
    return torch.tensor([0, vocab_size - 1, vocab_size // 2])


@pytest.mark.parametrize("shape", [(3, 1), (3, 7), (4, 256), (5, 300)])
def test_units(shape: tuple[int, int]) -> None:
    with sanitize(outputs={"units_kernel": ["units_ptr"]}):
        kernel_rows.units(torch.randn(shape), LogitTransform(softcap=5.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 1), (4, 256), (5, 300)])
def test_scale(shape: tuple[int, int], dtype: torch.dtype) -> None:
    values, factor = torch.randn(shape), torch.tensor(1.7)
    expected = (values * factor).to(dtype)
    with sanitize(outputs={"scale_kernel": ["out_ptr"]}):
        assert torch.equal(kernel_rows.scaled(values, factor, dtype), expected)


@SOFTCAPS
@VOCABULARIES
@LAYOUTS
def test_row_stats(rows: Rows, vocab_size: int, softcap: float | None) -> None:
    z, y, ids = rows(vocab_size), rows(vocab_size), target_ids(vocab_size)
    with sanitize(outputs={"row_stats_kernel": ["sums_ptr"]}):
        passes(vocab_size).statistics(Request(z, None, capped(softcap), ids))
        passes(vocab_size).statistics(Request(z, None, capped(softcap, topk=3, add_tail=True), ids))
        for own in (None, LogitTransform(2.0)):
            spec = capped(softcap, divergence="reverse_kl", own_teacher=own)
            passes(vocab_size).statistics(Request(z, y, spec, ids))


@pytest.mark.parametrize("divergence", MIXTURE_DIVERGENCES)
@OWN
@SOFTCAPS
@VOCABULARIES_OF_TWO
@LAYOUTS
def test_row_mixture(
    rows: Rows, vocab_size: int, softcap: float | None, own: LogitTransform | None, divergence: str
) -> None:
    z, y, spec = rows(vocab_size), rows(vocab_size), capped(softcap, divergence=divergence, own_teacher=own)
    with sanitize(outputs={"row_mixture_kernel": ["sums_ptr"]}):
        passes(vocab_size).statistics(Request(z, y, spec, target_ids(vocab_size)))


@pytest.mark.parametrize("topk", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@SOFTCAPS
@VOCABULARIES
@LAYOUTS
def test_row_grad_of_log_probs(
    rows: Rows, vocab_size: int, softcap: float | None, dtype: torch.dtype, topk: int
) -> None:
    z, spec, ids = rows(vocab_size), capped(softcap, topk=topk, add_tail=topk > 0), target_ids(vocab_size)
    (stats,) = passes(vocab_size).statistics(Request(z, None, spec, ids, entropy=True))
    gradients = RowGradients(log_probs=torch.randn(ROWS), entropy=torch.randn(ROWS))
    if topk:
        gradients = RowGradients(support_log_probs=torch.randn(ROWS, topk), log_tail=torch.randn(ROWS))
    with sanitize(outputs={"row_grad_kernel": ["out_ptr"]}):
        passes(vocab_size).dlogits_(Request(z, None, spec, ids), stats, gradients, out=place(z, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@OWN
@SOFTCAPS
@VOCABULARIES_OF_TWO
@LAYOUTS
def test_row_grad_of_a_divergence(
    rows: Rows,
    vocab_size: int,
    softcap: float | None,
    own: LogitTransform | None,
    divergence: str,
    dtype: torch.dtype,
) -> None:
    z, y, spec = rows(vocab_size), rows(vocab_size), capped(softcap, divergence=divergence, own_teacher=own)
    ids = target_ids(vocab_size)
    (stats,) = passes(vocab_size).statistics(Request(z, y, spec, ids, entropy=True))
    alone = RowGradients(divergence=torch.randn(ROWS))
    every = RowGradients(torch.randn(ROWS), torch.randn(ROWS), torch.randn(ROWS))
    with sanitize(outputs={"row_grad_kernel": ["out_ptr"]}):
        own = z.clone()
        passes(vocab_size).dlogits_(Request(own, y, spec, ids), stats, alone, out=place(own, dtype))
        # Ids before, in and behind the slice.
        foreign = coefficients(stats, every, spec, torch.tensor([vocab_size + 2, 0, -7]))
        kernel_rows.dlogits_(z, y, stats, foreign, spec, out=place(z, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_teacher", [False, True])
@SOFTCAPS
@pytest.mark.parametrize(("num_rows", "vocab_size", "hidden_size"), [(3, 7, 5), (70, 200, 33), (128, 128, 64)])
def test_tiles(
    num_rows: int, vocab_size: int, hidden_size: int, softcap: float | None, with_teacher: bool, dtype: torch.dtype
) -> None:
    def model(size: int) -> Projection:
        weight = torch.randn(vocab_size, size + 3).to(dtype)[:, :size]
        return Projection(torch.randn(num_rows, size).to(dtype), weight, torch.randn(vocab_size).to(dtype))

    student = model(hidden_size)
    teacher = model(hidden_size + 8) if with_teacher else None
    ids = torch.randint(0, vocab_size, (num_rows,))
    with sanitize(outputs={"tile_stats_kernel": ["sums_ptr"], "merge_tiles_kernel": ["merged_ptr"]}):
        tile_stats(student, teacher, capped(softcap, divergence="reverse_kl"), ids)


def test_tiles_of_a_weight_beyond_2_31_elements() -> None:
    weight = sparse_rows(3, 16, FAR, torch.float32)
    weight.copy_(torch.randn(3, 16))
    student, ids = Projection(torch.randn(2, 16), weight, None), torch.tensor([0, 2])
    with sanitize(outputs={"tile_stats_kernel": ["sums_ptr"]}):
        actual = tile_stats(student, None, RowSpec(), ids)
    expected = tile_stats(student._replace(weight=weight.clone()), None, RowSpec(), ids)
    assert torch.equal(actual.log_probs, expected.log_probs)


def same_bits(actual: object, expected: object) -> bool:
    if isinstance(actual, Tensor) and isinstance(expected, Tensor):
        return torch.equal(actual, expected)
    return actual == expected


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_statistics_of_the_same_logits_are_the_same_to_the_last_bit(divergence: str) -> None:
    z, y, ids, order = torch.randn(9, 129), torch.randn(9, 129), torch.arange(9), torch.randperm(9)
    spec = RowSpec(divergence=divergence)
    (together,) = passes(129).statistics(Request(z, y, spec, ids))
    (shuffled,) = passes(129).statistics(Request(z[order], y[order], spec, ids[order]))
    together = together.select(order)
    for actual, expected in zip(shuffled, together, strict=True):
        assert same_bits(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_is_the_same_to_the_last_bit_alone_and_in_any_batch(dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(150, 40).to(dtype), torch.randn(300, 40).to(dtype)
    teacher = torch.randn(150, 24).to(dtype), torch.randn(300, 24).to(dtype)
    ids = torch.randint(0, 300, (150,))

    def run(rows: Tensor) -> Statistics:
        return tile_stats(
            Projection(hidden[rows], weight, None),
            Projection(teacher[0][rows], teacher[1], None),
            RowSpec(divergence="forward_kl"),
            ids[rows],
        )

    together, order = run(torch.arange(150)), torch.randperm(150)
    for rows in (torch.tensor([7]), torch.tensor([149, 3]), order):
        actual, expected = run(rows)._asdict(), together.select(rows)._asdict()
        assert all(same_bits(actual[name], expected[name]) for name in expected)
        assert sum(isinstance(x, Tensor) for x in actual.values()) == 8
