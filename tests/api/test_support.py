"""Policy rows over the tokens that they were sampled from: log-probs, ratios and entropies of a top-k or a top-p."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import srpo_kernels as sk
from tests.comparison import assert_same, run_loss, run_stats, with_leaves
from tests.inputs import LEAVES, Inputs, cast, head_inputs, loss_inputs, random_support, with_given_topk
from tests.meters import ProductMeter
from tests.parity import check_loss, check_loss_in, check_stats, check_stats_in, coefficients
from tests.strategies import Case, each_backend, shapes

OPTIONS: list[dict[str, Any]] = [
    {},
    {"loss_type": "gspo", "entropy_coef": 0.1},
    {"loss_type": "kl_cov", "loss_options": {"share": 1.0}, "kl_coef": 0.1},
    {"count_inactive": True, "count_entropy": True, "softcap": 10.0, "temperature": 0.7},
    {"distillation_mode": "topk", "topk": 4},
]


GIVEN: dict[str, Any] = {"distillation_mode": "topk", "topk_of": "teacher"}


def with_support(inputs: Inputs, k: int) -> Inputs:
    return inputs | {"support_ids": random_support(inputs["target_ids"], len(inputs["weight"]), k)}


def by_columns(call: Callable[[], Any]) -> bool:
    """Whether a call has no product with the whole head."""
    with ProductMeter(columns=True) as meter:
        call()
    return not meter.multiply_adds


def batch(config: sk.SRPOConfig, k: int, rows: tuple[int, ...] = (5, 6)) -> Inputs:
    return with_support(loss_inputs(1, rows, teacher_size=5, config=config), k)


@each_backend
@pytest.mark.parametrize("k", [1, 5, 33])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_parity(options: dict[str, Any], k: int, backend: str) -> None:
    config = sk.SRPOConfig(**options)
    for rows in shapes(backend):
        check_loss_in(batch(config, k, rows), config, backend)


@each_backend
@pytest.mark.parametrize("k", [1, 5, 33])
@pytest.mark.parametrize("teacher", [True, False])
def test_statistics(teacher: bool, k: int, backend: str) -> None:
    for rows in shapes(backend):
        inputs = with_support(head_inputs(1, rows, 8, 33, teacher_size=5), k)
        if not teacher:
            inputs |= dict.fromkeys(("teacher_hidden", "teacher_weight", "teacher_bias"))
        for options in ({}, {"softcap": 5.0, "temperature": 0.7, "divergence": "reverse_kl"}):
            check_stats_in(inputs, backend, **options)


def test_the_whole_vocabulary_changes_nothing() -> None:
    config = sk.SRPOConfig(entropy_coef=0.1)
    inputs = loss_inputs(1, (5, 6), teacher_size=5)
    everything = torch.arange(33).expand(5, 6, 33)
    expected = run_loss(sk.srpo_loss, inputs, config=config)
    assert_same(run_loss(sk.srpo_loss, inputs | {"support_ids": everything}, config=config), expected, 1e-9)


def test_one_token_alone_has_no_gradient() -> None:
    config = sk.SRPOConfig()
    inputs = loss_inputs(1, (5, 6)) | {"sdpo_mask": None, "teacher_hidden": None}
    inputs["support_ids"] = inputs["target_ids"][..., None]
    out = run_loss(sk.srpo_loss, inputs, config=config)
    assert (out["log_probs"] == 0).all()
    assert (out["grad weight"] == 0).all() and (out["grad hidden"] == 0).all()


def test_rows_that_are_not_of_the_policy_are_not_read() -> None:
    config = sk.SRPOConfig()
    inputs = batch(config, 5)
    unread = ~(inputs["mask"] & ~inputs["sdpo_mask"][:, None])[..., None]
    spoilt = {"support_ids": inputs["support_ids"].masked_fill(unread, 2**40)}
    expected = run_loss(sk.srpo_loss, inputs, config=config)
    assert_same(run_loss(sk.srpo_loss, inputs | spoilt, config=config), expected, 0.0)


@each_backend
def test_tokens_that_a_large_softcap_cannot_tell_apart(backend: str) -> None:
    """Two excluded tokens at -1e6, where fp32 rounds at 0.06: their log-probs among themselves are known exactly."""
    hidden, bias = torch.tensor([[[120.0, -30.0]]]), torch.tensor([0.0, 0.0, -torch.inf, -torch.inf])
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.3, 0.1], [0.2, 0.4]])
    rows = {"target_ids": torch.tensor([[2]]), "support_ids": torch.tensor([[[3]]]), "softcap": 1e6, "bias": bias}
    stats = sk.token_stats(hidden, weight, **rows, backend=backend)
    expected = torch.tensor([[math.log(2.0)]])
    torch.testing.assert_close(-stats.log_probs, expected)
    torch.testing.assert_close(stats.entropy, expected)


@pytest.mark.parametrize(
    ("support_ids", "error", "message"),
    [
        (torch.zeros(5, 6), TypeError, "support_ids must be"),
        (torch.zeros(5, 6, dtype=torch.int64), ValueError, r"support_ids must have shape .*'K'.*got \[5, 6\]"),
        (torch.zeros(5, 6, 0, dtype=torch.int64), ValueError, r"with K >= 1, got \[5, 6, 0\]"),
        (torch.full((5, 6, 1), 33), ValueError, "support_ids must be below 33, .*got 33"),
        (
            torch.zeros(5, 6, 2, dtype=torch.int64),
            ValueError,
            r"support_ids must be distinct in each row, got \[0, 0\]",
        ),
    ],
)
def test_what_is_refused(support_ids: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sk.srpo_loss(**loss_inputs(1, (5, 6)), support_ids=support_ids)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("frozen", ["", "hidden", "weight"])
def test_the_columns_of_the_head_are_as_exact_as_all_of_it(softcap: float | None, frozen: str) -> None:
    # A support that is small beside the vocabulary: no logits of the row but these.
    config = sk.SRPOConfig(loss_type="gspo", entropy_coef=0.1, softcap=softcap, temperature=0.7, logit_scale=0.5)
    inputs = loss_inputs(1, (5, 6), vocab_size=400, teacher_size=5, config=config)
    inputs["support_ids"] = random_support(inputs["target_ids"], 400, 6)
    leaves = tuple(name for name in ("hidden", "weight", "bias") if name != frozen)
    check_loss_in(inputs, config, "torch", leaves)
    for dtype in (torch.float32, torch.bfloat16):
        check_loss(Case(inputs, {"config": config}, leaves), dtype, "torch")


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("frozen", ["", "hidden", "weight"])
def test_statistics_by_columns(softcap: float | None, frozen: str) -> None:
    leaves = tuple(name for name in LEAVES if name != frozen)
    config = sk.SRPOConfig(softcap=softcap, logit_scale=0.5, add_tail=False, **GIVEN)
    teachers: list[tuple[Inputs, dict[str, Any]]] = []
    for rows in shapes("torch"):
        inputs = with_support(head_inputs(1, rows, 8, 400, teacher_size=5), 6)
        nobody = dict.fromkeys(("teacher_hidden", "teacher_weight", "teacher_bias"))
        teachers += [(inputs | nobody, {"softcap": softcap}), (with_given_topk(inputs, config, 4), {"config": config})]
    for inputs, options in teachers:
        assert by_columns(partial(run_stats, sk.token_stats, inputs, coefficients(inputs), leaves, **options))
        check_stats_in(inputs, "torch", leaves, **options)
        for dtype in (torch.float32, torch.bfloat16):
            check_stats(Case(inputs, options, leaves), dtype, "torch")


def test_the_columns_cost_no_product() -> None:
    def floating(vocab_size: int, **options: Any) -> int:
        inputs = loss_inputs(1, (5, 6), vocab_size=vocab_size) | {"sdpo_mask": None, "teacher_hidden": None}
        inputs |= {
            "mask": None,
            "advantages": torch.ones(5),
            "support_ids": random_support(inputs["target_ids"], vocab_size, 2),
        }
        with FlopCounterMode(display=False) as counter:
            run_loss(sk.srpo_loss, inputs, config=sk.SRPOConfig(**options))
        return counter.get_total_flops()

    assert floating(4000) == floating(400) < floating(90)


class Passes(TorchDispatchMode):
    """The operators that go over a tensor of a shape, by name."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.names = shape, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.shape == self.shape:
            self.names.append(func.overloadpacket.__name__)
        return result


@pytest.mark.parametrize(("dtype", "last"), [(torch.float32, []), (torch.bfloat16, ["_to_copy"])])
def test_the_gradient_of_the_head_by_columns_is_zeros_to_which_rows_are_added(
    dtype: torch.dtype, last: list[str]
) -> None:
    inputs = loss_inputs(1, (5, 6), vocab_size=400) | {"sdpo_mask": None, "teacher_hidden": None, "mask": None}
    inputs = with_leaves(cast(with_support(inputs, 2), dtype), ("hidden", "weight"))
    with Passes((400, 8)) as passes:
        sk.srpo_loss(**inputs).loss.backward()
    # No other operator goes over all of it: neither to write zeros, nor to scale by an upstream gradient of 1.
    assert [x for x in passes.names if x not in ("detach", "empty", "alias")] == ["zeros", "index_add_", *last]


@pytest.mark.parametrize("lists", [[[3, 1], [], [7, 0, 5]], [[], []], [[4]], []])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lists_of_tokens(lists: list[list[int]], dtype: torch.dtype) -> None:
    ends = [sum(map(len, lists[:n])) for n in range(len(lists) + 1)]
    ids = torch.tensor([x for own in lists for x in own], dtype=dtype)
    padded = sk.pad_support(ids, torch.tensor(ends, dtype=dtype))
    assert padded.dtype == torch.int64
    width = max([1, *map(len, lists)])
    assert padded.tolist() == [x + [-1] * (width - len(x)) for x in lists]


@pytest.mark.parametrize(
    ("ids", "offsets", "message"),
    [
        ([1, 2], [1, 2], "offsets must lead from 0 to the 2 ids and never back, got 1 to 2"),
        ([1, 2], [0, 1], "got 0 to 1"),
        ([1, 2], [0, 2, 1, 2], "and back by 1"),
        ([1, -1], [0, 2], "ids must not be negative.*got -1"),
        ([[1, 2]], [0, 2], r"ids must have shape \[M\], got \[1, 2\]"),
        ([1, 2], [[0, 2]], "offsets must have shape"),
        ([1, 2], [], "offsets must have shape"),
    ],
)
def test_lists_that_are_none(ids: list[int], offsets: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sk.pad_support(torch.tensor(ids), torch.tensor(offsets, dtype=torch.int64))
    with pytest.raises(TypeError, match="offsets must be"):
        sk.pad_support(torch.tensor(ids).flatten(), torch.ones(2))
