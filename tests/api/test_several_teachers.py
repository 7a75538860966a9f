"""Several teachers in one batch: a head of a list for each row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import reference
import srpo_kernels as sk
from srpo_kernels.engine import gemm
from srpo_kernels.rows.spec import DIVERGENCES
from tests.comparison import assert_as_accurate, assert_same, condition_of, run_loss
from tests.inputs import Inputs, cast, loss_inputs, workspace_floor
from tests.parity import check_loss_in
from tests.strategies import each_backend

ROWS = ((6, 5), (29,))


def batch(rows: tuple[int, ...] = (6, 5), heads: int = 3, *, tied: bool = False, per_row: bool = False) -> Inputs:
    """Teachers of one size; ``tied``: the second one has the student's head, the third no bias."""
    inputs = loss_inputs(1, rows, teacher_size=None if tied else 5)
    generator = torch.Generator().manual_seed(2)
    size, vocab_size = inputs["teacher_hidden"].shape[-1], len(inputs["weight"])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights: list[Tensor | None] = [normal(vocab_size, size) for _ in range(heads)]
    biases: list[Tensor | None] = [normal(vocab_size) for _ in range(heads)]
    if tied:
        weights[1], biases[1:3] = None, [None, None]
    shape = rows if per_row else rows[:1]
    ids = torch.randint(0, heads, shape, generator=generator)
    return inputs | {"teacher_weight": weights, "teacher_bias": biases, "teacher_head_ids": ids}


@each_backend
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_parity(rows: tuple[int, ...], tied: bool, per_row: bool, backend: str) -> None:
    check_loss_in(batch(rows, tied=tied, per_row=per_row), sk.SRPOConfig(softcap=20.0, temperature=0.8), backend)


@each_backend
@pytest.mark.parametrize(
    "options",
    [
        *({"divergence": x} for x in DIVERGENCES),
        {"distillation_mode": "topk", "topk": 3},
        {"distillation_mode": "topk", "topk": 3, "topk_of": "teacher"},
        {"distillation_mode": "sampled"},
        {"loss_type": "gspo"},
        # The teachers' entropies come first.
        {"dw_beta": 30.0},
    ],
    ids=str,
)
def test_every_mode_in_small_chunks(options: dict[str, Any], backend: str) -> None:
    floor = workspace_floor(33, 4 if backend == "triton" else 8, 2, backend)
    check_loss_in(batch(), sk.SRPOConfig(**options), backend, workspace_bytes=3 * floor)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_the_routed_entries_alone(rows: tuple[int, ...], per_row: bool) -> None:
    inputs, config = batch(rows, per_row=per_row), sk.SRPOConfig()
    expected = run_loss(sk.srpo_loss, inputs, config=config)
    routed = {name: inputs[name][inputs["sdpo_mask"]] for name in ("teacher_hidden", "teacher_head_ids")}
    for given in ({"teacher_head_ids": routed["teacher_head_ids"]}, routed):
        assert_same(run_loss(sk.srpo_loss, inputs | given, config=config), expected, 0.0)
        assert_same(run_loss(reference.srpo_loss, inputs | given, config=config), expected, 1e-9)


def test_ids_of_rows_without_a_teacher_are_not_read() -> None:
    inputs, config = batch(per_row=True), sk.SRPOConfig()
    unread = ~(inputs["mask"] & inputs["sdpo_mask"][:, None])
    spoilt = inputs | {"teacher_head_ids": inputs["teacher_head_ids"].masked_fill(unread, -7)}
    expected = run_loss(sk.srpo_loss, inputs, config=config)
    assert_same(run_loss(sk.srpo_loss, spoilt, config=config), expected, 0.0)


def test_no_row_has_a_teacher() -> None:
    inputs = batch() | {"sdpo_mask": torch.zeros(6, dtype=torch.bool)}
    check_loss_in(inputs, sk.SRPOConfig(), "torch")


def test_one_list_of_equal_heads_is_one_head() -> None:
    inputs = loss_inputs(1, (6, 5), teacher_size=5)
    heads = {name: [inputs[name]] * 3 for name in ("teacher_weight", "teacher_bias")}
    many = inputs | heads | {"teacher_head_ids": torch.arange(6, dtype=torch.int32) % 3}
    assert_same(run_loss(sk.srpo_loss, many), run_loss(sk.srpo_loss, inputs), 1e-12)


def test_it_costs_no_product_more() -> None:
    inputs = batch() | {"mask": torch.ones(6, 5, dtype=torch.bool), "sdpo_mask": torch.ones(6, dtype=torch.bool)}
    one = inputs | {name: inputs[name][0] for name in ("teacher_weight", "teacher_bias")} | {"teacher_head_ids": None}
    flops = []
    for call in (inputs, one):
        with FlopCounterMode(display=False) as counter:
            run_loss(sk.srpo_loss, call)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] == 2 * 30 * 33 * (3 * 8 + 5)


def test_rows_are_sorted_by_head(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batch(per_row=True) | {"mask": None, "sdpo_mask": torch.ones(6, dtype=torch.bool)}
    products = []

    def project(operand: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> None:
        products.append(any(weight is x for x in inputs["teacher_weight"]))
        original(operand, weight, bias, out=out)

    original = gemm.project
    monkeypatch.setattr(gemm, "project", project)
    run_loss(sk.srpo_loss, inputs, workspace_bytes=5 * workspace_floor(33, 8, 2))
    chunks = products.count(False)
    # A chunk has another head only where one ends.
    assert chunks > 3
    assert products.count(True) <= chunks + 2


@each_backend
@pytest.mark.parametrize("whole_sequences", [False, True])
def test_fused_loss(whole_sequences: bool, backend: str) -> None:
    inputs = cast(batch(per_row=True), torch.float32 if backend == "triton" else torch.float64)
    names = ("weight", "target_ids", "bias", "mask", "teacher_hidden", "teacher_weight", "teacher_bias")
    hidden, taught = inputs["hidden"].clone().requires_grad_(), inputs["sdpo_mask"]

    def objective(rows: sk.ObjectiveRows) -> Tensor:
        losses = rows.divergence + 0.1 * rows.teacher_entropy * rows.log_probs
        return rows.sequence_mean(losses) if whole_sequences else losses

    out = sk.fused_loss(
        hidden,
        **{name: inputs[name] for name in names},
        objective=objective,
        teacher_mask=taught,
        teacher_head_ids=inputs["teacher_head_ids"],
        whole_sequences=whole_sequences,
        backend=backend,
        workspace_bytes=4 * workspace_floor(33, hidden.element_size(), 2, backend),
    )
    exact = inputs["hidden"].double().requires_grad_()
    losses = []
    for i, (weight, bias) in enumerate(zip(inputs["teacher_weight"], inputs["teacher_bias"], strict=True)):
        own = inputs["mask"] & taught[:, None] & (inputs["teacher_head_ids"] == i)
        student = {name: inputs[name].double() for name in ("weight", "bias", "teacher_hidden")}
        head = {"teacher_weight": weight.double(), "teacher_bias": bias.double()}
        stats = reference.token_stats(exact, **student, **head, target_ids=inputs["target_ids"], mask=own)
        assert stats.divergence is not None and stats.teacher_entropy is not None
        losses.append(stats.divergence + 0.1 * stats.teacher_entropy * stats.log_probs)
    # The sum of the means over a sequence's rows is that of the rows.
    loss = torch.stack(losses).sum()
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if backend == "torch" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out.loss.double(), loss, **tolerance)
    (actual,), (expected,) = torch.autograd.grad(out.loss, hidden), torch.autograd.grad(loss, exact)
    torch.testing.assert_close(actual.double(), expected, **tolerance)


def test_bf16_is_as_accurate_as_plain_torch() -> None:
    inputs, config = cast(batch(), torch.bfloat16), sk.SRPOConfig()
    actual, naive = (run_loss(f, inputs, config=config) for f in (sk.srpo_loss, reference.srpo_loss))
    exact = run_loss(reference.srpo_loss, cast(inputs, torch.float64), config=config)
    assert_as_accurate(actual, naive, exact, condition=condition_of(config, exact))


def test_a_compiled_graph_has_them_too() -> None:
    inputs = batch(tied=True)
    compiled = torch.compile(sk.srpo_loss, backend="aot_eager", fullgraph=True)
    assert_same(run_loss(compiled, inputs), run_loss(sk.srpo_loss, inputs), 1e-12)


GOOD = batch()
WEIGHTS, BIASES, IDS = (GOOD[f"teacher_{name}"] for name in ("weight", "bias", "head_ids"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"teacher_head_ids": None}, ValueError, "teacher_weight must be a .* unless teacher_head_ids says"),
        ({"teacher_weight": WEIGHTS[0], "teacher_bias": None}, ValueError, "teacher_head_ids needs a list.*got Tensor"),
        ({"teacher_weight": None, "teacher_bias": None}, ValueError, "teacher_head_ids needs a list.*got NoneType"),
        ({"teacher_weight": [], "teacher_bias": None}, ValueError, "teacher_weight must have one head at least"),
        ({"teacher_bias": BIASES[:2]}, ValueError, "teacher_bias must be a list of 3, .*got 2"),
        ({"teacher_bias": BIASES[0]}, ValueError, "teacher_bias must be a list of 3, .*got Tensor"),
        ({"teacher_weight": [*WEIGHTS[:2], 1.0]}, TypeError, r"teacher_weight\[2\] must be a torch.Tensor, got float"),
        (
            {"teacher_weight": [*WEIGHTS[:2], torch.ones(33, 6)]},
            ValueError,
            r"teacher_hidden and teacher_weight\[2\] must agree.*\[33, 6\]",
        ),
        (
            {"teacher_weight": [*WEIGHTS[:2], torch.ones(32, 5)], "teacher_bias": None},
            ValueError,
            r"teacher_weight\[2\] and weight must have one vocabulary, got \[32, 5\]",
        ),
        ({"teacher_bias": [*BIASES[:2], torch.ones(32)]}, ValueError, r"teacher_bias\[2\] must have shape \[33\]"),
        ({"teacher_weight": [None, *WEIGHTS[1:]]}, ValueError, r"teacher_bias\[0\] needs teacher_weight\[0\]"),
        ({"teacher_hidden": None}, ValueError, r"teacher_weight\[0\] needs teacher_hidden"),
        ({"sdpo_mask": None, "teacher_hidden": None}, ValueError, "teacher_weight needs sdpo_mask"),
        ({"teacher_head_ids": IDS.double()}, TypeError, "teacher_head_ids must be int64"),
        ({"teacher_head_ids": IDS[:, None]}, ValueError, r"teacher_head_ids must have shape \[6\] or .*got \[6, 1\]"),
        ({"teacher_head_ids": IDS[:1]}, ValueError, r"teacher_head_ids must have 6 entries, or the \d routed.*\[1\]"),
        ({"teacher_head_ids": IDS + 3}, ValueError, r"teacher_head_ids must lie in \[0, 3\).*got \d"),
        ({"teacher_head_ids": IDS - 3}, ValueError, r"teacher_head_ids must lie in \[0, 3\).*got -\d"),
    ],
)
def test_what_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sk.srpo_loss(**{**GOOD, **change})


def test_statistics_take_one_head() -> None:
    names = ("hidden", "weight", "target_ids", "teacher_hidden", "teacher_weight")
    with pytest.raises(ValueError, match=r"teacher_weight must be one head.*token_stats.*the mask of a call for each"):
        sk.token_stats(**{name: GOOD[name] for name in names})
