from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from srpo_kernels import Normalizers, SRPOConfig, srpo_loss
from tests.inputs import loss_inputs


class Batch(NamedTuple):
    mask: Tensor
    sdpo_mask: Tensor
    entropy: Tensor


@st.composite
def batches(draw: st.DrawFn, max_sequences: int = 5) -> Batch:
    """``[B, T]``, routes per sequence or per token, NaN and inf where the entropy must not be read."""
    sequences, length = draw(st.integers(0, max_sequences)), draw(st.integers(0, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def coins(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))

    mask = coins(sequences, length)
    sdpo_mask = coins(sequences, length) if draw(st.booleans()) else coins(sequences)
    entropy = 12 * torch.rand(sequences, length, generator=generator, dtype=torch.float64)
    unread = ~(mask & (sdpo_mask if sdpo_mask.dim() == 2 else sdpo_mask[:, None]))
    entropy[unread] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    return Batch(mask, sdpo_mask, entropy)


def routed_sequences(batch: Batch) -> Tensor:
    return batch.sdpo_mask.any(1) if batch.sdpo_mask.dim() == 2 else batch.sdpo_mask


def read_entropies(batch: Batch) -> list[float]:
    sdpo = batch.sdpo_mask if batch.sdpo_mask.dim() == 2 else batch.sdpo_mask[:, None].expand_as(batch.mask)
    return batch.entropy[batch.mask & sdpo].tolist()


def assert_equal(actual: Normalizers, expected: Normalizers) -> None:
    assert actual.token_count == expected.token_count
    assert actual.sdpo_count == expected.sdpo_count
    assert actual.sequence_count == expected.sequence_count
    torch.testing.assert_close(actual.dw_log_mean, expected.dw_log_mean, rtol=1e-13, atol=1e-13)


@given(batches(), st.sampled_from([0.0, 0.5, 1, 3.0]))
def test_from_batch_counts_and_averages_the_valid_tokens(batch: Batch, dw_beta: float) -> None:
    normalizers = Normalizers.from_batch(*batch, dw_beta)
    weights = [math.exp(-dw_beta * entropy) for entropy in read_entropies(batch)]
    log_mean = math.log(math.fsum(weights) / len(weights)) if weights else 0.0
    assert normalizers.token_count == batch.mask.sum()
    assert normalizers.sdpo_count == len(weights)
    assert normalizers.sequence_count == batch.mask.any(1).sum()
    assert float(normalizers.dw_log_mean) == pytest.approx(log_mean, abs=1e-12)
    assert [value.dtype for value in normalizers] == [torch.int64, torch.float64, torch.int64, torch.int64]
    assert all(value.shape == () for value in normalizers)


@given(batches())
def test_weights_average_to_one_over_the_sdpo_tokens(batch: Batch) -> None:
    log_mean = float(Normalizers.from_batch(*batch, 1.0).dw_log_mean)
    weights = [math.exp(-entropy - log_mean) for entropy in read_entropies(batch)]
    assert not weights or math.fsum(weights) / len(weights) == pytest.approx(1.0, rel=1e-12)


@given(batches())
def test_the_teacher_may_come_for_the_routed_sequences_alone(batch: Batch) -> None:
    routed = batch.entropy[routed_sequences(batch)]
    expected = Normalizers.from_batch(*batch, 1.0)
    assert_equal(Normalizers.from_batch(batch.mask, batch.sdpo_mask, routed, 1.0), expected)


@given(batches())
def test_packed_rows_count_as_the_batch_does(batch: Batch) -> None:
    mask = batch.mask.flatten()
    sdpo_mask = batch.sdpo_mask if batch.sdpo_mask.dim() == 2 else batch.sdpo_mask[:, None]
    sdpo_mask = sdpo_mask.expand_as(batch.mask).flatten()
    sequence_ids = torch.arange(len(batch.mask))[:, None].expand_as(batch.mask).flatten() * 7 - 3
    entropy = batch.entropy.flatten()
    expected = Normalizers.from_batch(*batch, 1.0)
    valid = [values[mask] for values in (mask, sdpo_mask, entropy)]
    assert_equal(Normalizers.from_batch(*valid, 1.0, sequence_ids[mask]), expected)
    assert_equal(Normalizers.from_batch(mask, sdpo_mask, entropy, 1.0, sequence_ids), expected)
    assert_equal(Normalizers.from_batch(mask, sdpo_mask, entropy[sdpo_mask], 1.0, sequence_ids), expected)
    assert Normalizers.from_batch(mask, sdpo_mask, entropy, 1.0).sequence_count is None


@given(batches(max_sequences=8), st.data())
def test_merged_parts_are_the_whole(batch: Batch, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(batch.mask)), max_size=3)))
    bounds = zip([0, *cuts], [*cuts, len(batch.mask)], strict=True)
    parts = [Normalizers.from_batch(*(field[i:j] for field in batch), 1.0) for i, j in bounds]
    whole = Normalizers.from_batch(*batch, 1.0)
    first, *rest = data.draw(st.permutations(parts))
    assert_equal(first.merge(*rest), whole)
    pairwise = first
    for part in rest:
        pairwise = part.merge(pairwise)
    assert_equal(pairwise, whole)


def test_merge_works_in_the_log_domain() -> None:
    mask, sdpo_mask = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, dtype=torch.bool)
    far, near = (Normalizers.from_batch(mask, sdpo_mask, torch.full((1, 2), h), 100.0) for h in (12.0, 11.0))
    assert float(far.dw_log_mean) == -1200.0
    assert float(far.merge(near).dw_log_mean) == pytest.approx(-1100 - math.log(2), rel=1e-15)


def test_merge_keeps_the_sequence_count_unknown() -> None:
    known = Normalizers.from_batch(torch.ones(2, 3, dtype=torch.bool), None, None, 1.0)
    unknown = Normalizers.from_batch(torch.ones(3, dtype=torch.bool), None, None, 1.0)
    assert known.merge(unknown).sequence_count is None
    assert unknown.merge(known).sequence_count is None
    assert known.merge(known).sequence_count == 4
    assert known.merge(unknown).token_count == 9


def test_merge_needs_the_sdpo_count() -> None:
    known = Normalizers.from_batch(torch.ones(2, 3, dtype=torch.bool), None, None, 1.0)
    with pytest.raises(ValueError, match="sdpo_count must be known"):
        known.merge(known._replace(sdpo_count=None))
    with pytest.raises(TypeError, match="others must be Normalizers, got tuple"):
        known.merge((1, 2, 3, 4))  # type: ignore[arg-type]


def test_all_reduce_of_a_single_process_is_the_identity() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    normalizers = Normalizers.from_batch(mask, mask.any(1), torch.rand(2, 2), 1.0)
    assert_equal(normalizers.all_reduce(), normalizers)


def test_low_precision_entropies_are_averaged_in_high_precision() -> None:
    entropy = torch.linspace(0, 8, 4096).bfloat16().view(1, -1)
    mask = torch.ones_like(entropy, dtype=torch.bool)
    expected = torch.logsumexp(-entropy.double(), 1).sub(math.log(4096)).squeeze()
    torch.testing.assert_close(
        Normalizers.from_batch(mask, mask, entropy, 1.0).dw_log_mean, expected, rtol=1e-14, atol=0
    )


def test_it_carries_no_gradient() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    normalizers = Normalizers.from_batch(mask, mask, torch.rand(1, 2, requires_grad=True), 1.0)
    assert not normalizers.dw_log_mean.requires_grad


BOOLS = torch.ones(3, 4, dtype=torch.bool)
ENTROPY = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mask": None}, TypeError, r"mask must be a torch.Tensor, got NoneType"),
        ({"mask": BOOLS.long()}, TypeError, r"mask must be bool, got int64"),
        ({"mask": BOOLS[None]}, ValueError, r"mask must have shape \[B, T\] or \[N\], got \[1, 3, 4\]"),
        ({"sdpo_mask": [True] * 3}, TypeError, r"sdpo_mask must be a torch.Tensor, got list"),
        ({"sdpo_mask": ENTROPY}, TypeError, r"sdpo_mask must be bool, got float32"),
        ({"sdpo_mask": BOOLS[0]}, ValueError, r"sdpo_mask must have shape \[3\] or \[3, 4\] .*, got \[4\]"),
        ({"sdpo_mask": BOOLS.to("meta")}, ValueError, r"sdpo_mask must be on the device .* cpu, got meta"),
        ({"teacher_entropy": None}, ValueError, r"teacher_entropy is required .* None with dw_beta=1.0"),
        ({"teacher_entropy": 1.0}, TypeError, r"teacher_entropy must be a torch.Tensor, got float"),
        ({"teacher_entropy": ENTROPY.int()}, TypeError, r"teacher_entropy must be float32 .*, got int32"),
        (
            {"teacher_entropy": ENTROPY[:2]},
            ValueError,
            r"teacher_entropy must have shape \[3, 4\] .*\[2, 4\]",
        ),
        ({"teacher_entropy": ENTROPY.to("meta")}, ValueError, r"teacher_entropy must be on the device"),
        ({"dw_beta": -1.0}, ValueError, r"dw_beta must be a finite number >= 0, got -1.0"),
        ({"dw_beta": math.nan}, ValueError, r"dw_beta must be a finite number >= 0, got nan"),
        ({"dw_beta": True}, TypeError, r"dw_beta must be a number >= 0, got True"),
        ({"sequence_ids": torch.arange(3)}, ValueError, r"sequence_ids is for packed rows.*got \[3, 4\]"),
    ],
)
def test_from_batch_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "mask": BOOLS,
        "sdpo_mask": BOOLS[:, 0],
        "teacher_entropy": ENTROPY,
        "dw_beta": 1.0,
    }
    with pytest.raises(error, match=message):
        Normalizers.from_batch(**arguments | changes)


@pytest.mark.parametrize(
    ("sequence_ids", "error", "message"),
    [
        ([0, 0, 1], TypeError, r"sequence_ids must be a torch.Tensor, got list"),
        (torch.ones(3), TypeError, r"sequence_ids must be int64 .*, got float32"),
        (torch.arange(4), ValueError, r"sequence_ids must have shape \[3\] .*, got \[4\]"),
    ],
)
def test_from_batch_refuses_of_packed_rows(sequence_ids: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Normalizers.from_batch(BOOLS[:, 0], None, None, 1.0, sequence_ids)


def test_no_teacher_is_needed_where_no_weight_depends_on_it() -> None:
    assert Normalizers.from_batch(BOOLS, BOOLS[:, 0], None, 0.0).sdpo_count == 12
    assert Normalizers.from_batch(~BOOLS, BOOLS[:, 0], None, 1.0).sdpo_count == 0
    assert Normalizers.from_batch(BOOLS, None, None, 1.0).sdpo_count == 0


GOOD = Normalizers(torch.tensor(12), torch.tensor(-2.0), torch.tensor(5), torch.tensor(3))
BAD_FIELDS: list[tuple[str, Any, type[Exception], str]] = [
    ("token_count", 12, TypeError, "torch.Tensor, got int"),
    ("token_count", None, TypeError, "torch.Tensor, got NoneType"),
    ("token_count", torch.tensor(True), TypeError, "int64.*got bool"),
    ("token_count", torch.tensor(12.0).bfloat16(), TypeError, "got bfloat16"),
    ("token_count", torch.tensor(1 + 0j), TypeError, "got complex64"),
    ("token_count", torch.tensor([12]), ValueError, r"shape \[\].*scalar.*got \[1\]"),
    ("token_count", torch.tensor(-1), ValueError, "finite and >= 0, got -1"),
    ("token_count", torch.tensor(math.nan), ValueError, "finite and >= 0, got nan"),
    ("token_count", torch.tensor(math.inf), ValueError, "finite and >= 0, got inf"),
    ("dw_log_mean", -2.0, TypeError, "torch.Tensor, got float"),
    ("dw_log_mean", torch.tensor(-2), TypeError, "float32 or float64, got int64"),
    ("dw_log_mean", torch.tensor(-2.0).half(), TypeError, "float32 or float64, got float16"),
    ("dw_log_mean", torch.zeros(2), ValueError, r"scalar.*got \[2\]"),
    ("dw_log_mean", torch.tensor(math.nan), ValueError, "finite, got nan"),
    ("dw_log_mean", torch.tensor(-math.inf), ValueError, "finite, got -inf"),
    ("sdpo_count", 5, TypeError, "torch.Tensor, got int"),
    ("sdpo_count", torch.tensor(-5), ValueError, "finite and >= 0, got -5"),
    ("sequence_count", torch.tensor(False), TypeError, "got bool"),
    ("sequence_count", torch.tensor(-3), ValueError, "finite and >= 0, got -3"),
    ("sequence_count", torch.ones(3, 1), ValueError, r"scalar.*got \[3, 1\]"),
]


@pytest.mark.parametrize(("field", "value", "error", "message"), BAD_FIELDS)
def test_normalizers_that_no_batch_has_are_refused(
    field: str, value: Any, error: type[Exception], message: str
) -> None:
    bad = GOOD._replace(**{field: value})
    inputs = loss_inputs(0, (3, 4))
    srpo_loss(**inputs, normalizers=GOOD, config=SRPOConfig(reduction="sequence"))
    for use in (
        lambda: srpo_loss(**inputs, normalizers=bad, config=SRPOConfig(reduction="sequence")),
        lambda: bad.merge(GOOD),
        lambda: GOOD.merge(bad),
        bad.all_reduce,
    ):
        with pytest.raises(error, match=rf"\.{field} must.*{message}"):
            use()


@pytest.mark.parametrize(("field", "reduction"), [("token_count", "token"), ("sequence_count", "sequence")])
def test_a_count_of_0_does_not_go_with_rows(field: str, reduction: str) -> None:
    inputs = loss_inputs(0, (3, 4))
    none = GOOD._replace(**{field: torch.tensor(0)})
    with pytest.raises(ValueError, match=rf"normalizers\.{field} must count the valid rows of this call too, got 0"):
        srpo_loss(**inputs, normalizers=none, config=SRPOConfig(reduction=reduction))
    inputs["mask"][:] = False
    assert srpo_loss(**inputs, normalizers=none, config=SRPOConfig(reduction=reduction)).loss == 0


def test_a_count_may_be_a_mean_over_ranks() -> None:
    """What a trainer whose gradients are averaged over ranks may divide by, in place of a factor of the loss."""
    inputs = loss_inputs(0, (3, 4))
    half, whole = (
        srpo_loss(**inputs, normalizers=GOOD._replace(token_count=count)).loss
        for count in (torch.tensor(0.5), torch.tensor(1))
    )
    torch.testing.assert_close(half, 2.0 * whole)
