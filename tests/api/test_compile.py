"""The public functions under ``torch.compile``: the eager result, in one graph, at any number of rows."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from srpo_kernels import Normalizers, SRPOConfig, SRPOLoss, srpo_loss, teacher_stats, token_stats
from tests.comparison import Results, assert_same, gradients, run_loss, with_leaves
from tests.inputs import Inputs, cast, head_inputs, loss_inputs

# Among them the sizes of both models' hidden states.
LENGTHS = (7, 11, 5, 16, 2, 8)
OPERATORS = torch.ops.srpo_kernels
ONE_TEACHER = {"teacher_weight": None, "teacher_bias": None}


@pytest.fixture(autouse=True)
def no_compiled_code() -> Iterator[None]:
    """Every test compiles on its own."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(options.pop("backend", "aot_eager"))
    return torch.compile(function, backend=counter, fullgraph=True, **options), counter


def packed_gspo(inputs: Inputs) -> Inputs:
    return inputs | {"sequence_ids": torch.arange(len(inputs["target_ids"])) // 4}


def batches(**options: Any) -> Iterator[Inputs]:
    """Packed batches of several lengths."""
    for length in LENGTHS:
        yield packed_gspo(cast(loss_inputs(0, (length,), 8, 33, **options), torch.float32))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "gspo", "reduction": "sequence", "dw_beta": 30.0},
        {"distillation_mode": "topk", "topk": 3, "kl_coef": 0.1, "entropy_coef": 0.1, "count_inactive": True},
    ],
    ids=str,
)
def test_the_loss_at_any_length_is_compiled_twice_at_most(options: dict[str, Any]) -> None:
    config = SRPOConfig(**options)
    function, counter = compiled(srpo_loss)
    for inputs in batches(teacher_size=5):
        actual = run_loss(function, inputs, config=config)
        assert_same(actual, run_loss(srpo_loss, inputs, config=config), 0.0)
        assert counter.frame_count <= 2


def test_the_loss_with_rows_marked_dynamic_is_compiled_once() -> None:
    per_row = ("hidden", "target_ids", "mask", "teacher_hidden", "sdpo_mask", "advantages")
    function, counter = compiled(srpo_loss)
    for inputs in batches():
        inputs = with_leaves({name: inputs[name] for name in (*per_row, "weight")})
        for name in per_row:
            torch._dynamo.mark_dynamic(inputs[name], 0)
        loss = function(**inputs).loss
        assert_same(gradients(loss, inputs), gradients(srpo_loss(**inputs).loss, inputs), 0.0)
    assert counter.frame_count == 1


def test_padded_batches_of_any_shape_and_number_of_routed_sequences() -> None:
    function, counter = compiled(srpo_loss)
    for seed, rows in enumerate([(2, 3), (3, 5), (4, 2), (5, 4), (3, 7)]):
        inputs = cast(loss_inputs(seed, rows), torch.float32)
        inputs["sdpo_mask"] = torch.arange(rows[0]) % 2 == 0
        inputs["teacher_hidden"] = inputs["teacher_hidden"][inputs["sdpo_mask"]]
        assert_same(run_loss(function, inputs), run_loss(srpo_loss, inputs), 0.0)
        assert counter.frame_count <= 3


def test_normalizers_and_a_workspace() -> None:
    inputs = loss_inputs(0, (4, 6))
    entropy = teacher_stats(inputs["teacher_hidden"], inputs["weight"], teacher_bias=inputs["bias"]).entropy
    normalizers = Normalizers.from_batch(inputs["mask"], inputs["sdpo_mask"], entropy, 1.0)
    options = {"normalizers": normalizers, "workspace_bytes": 10_000, "config": SRPOConfig(reduction="sequence")}
    function, _ = compiled(srpo_loss)
    assert_same(run_loss(function, inputs, **options), run_loss(srpo_loss, inputs, **options), 0.0)


@pytest.mark.parametrize("leaves", [("hidden",), ("weight",), ()], ids=str)
def test_leaves_that_need_no_gradient(leaves: tuple[str, ...]) -> None:
    inputs = loss_inputs(0, (4, 6))
    function, _ = compiled(srpo_loss)
    assert_same(run_loss(function, inputs, leaves), run_loss(srpo_loss, inputs, leaves), 0.0)
    with torch.no_grad():
        assert not function(**with_leaves(inputs)).loss.requires_grad


def test_the_result_follows_the_configuration() -> None:
    inputs = loss_inputs(0, (4, 6))
    function, counter = compiled(srpo_loss)
    for config in (SRPOConfig(), SRPOConfig(dw_beta=0.5), SRPOConfig(divergence="reverse_kl"), SRPOConfig()):
        assert_same(run_loss(function, inputs, config=config), run_loss(srpo_loss, inputs, config=config), 0.0)
    assert counter.frame_count == 3
    # An equal configuration is the same one.
    function(**with_leaves(inputs), config=SRPOConfig(dw_beta=0.5))
    assert counter.frame_count == 3


def test_the_module_follows_its_configuration() -> None:
    inputs, module = loss_inputs(0, (4, 6)), SRPOLoss()
    function, counter = compiled(module)
    assert_same(run_loss(function, inputs), run_loss(srpo_loss, inputs), 0.0)
    module.config = SRPOConfig(temperature=0.7)
    assert_same(run_loss(function, inputs), run_loss(srpo_loss, inputs, config=module.config), 0.0)
    assert counter.frame_count == 2


def statistics_of(function: Callable[..., Any], inputs: Inputs, **options: Any) -> Results:
    inputs = with_leaves(inputs)
    out = function(**inputs, **options)
    results = {name: x for name, x in out._asdict().items() if x is not None}
    total = sum((x * torch.arange(1, 1 + x.numel()).view_as(x)).sum() for x in results.values() if x.requires_grad)
    assert isinstance(total, Tensor)
    return {name: x.detach() for name, x in results.items()} | gradients(total, inputs)


@pytest.mark.parametrize("teacher", [True, False])
def test_statistics_at_any_length_are_compiled_twice_at_most(teacher: bool) -> None:
    function, counter = compiled(token_stats)
    for length in LENGTHS:
        inputs = cast(head_inputs(0, (length,), 8, 33), torch.float32)
        if not teacher:
            inputs["teacher_hidden"] = None
        assert_same(statistics_of(function, inputs), statistics_of(token_stats, inputs), 0.0)
        assert counter.frame_count <= 2


def test_statistics_follow_their_options() -> None:
    inputs = head_inputs(0, (4, 6), 8, 33, teacher_size=5)
    function, _ = compiled(token_stats)
    keywords = ({}, {"divergence": "reverse_kl"}, {"temperature": 0.7}, {"temperature": 0.6, "softcap": 5.0})
    for options in (*keywords, {"config": SRPOConfig(divergence="forward_kl", softcap=5.0)}):
        assert_same(statistics_of(function, inputs, **options), statistics_of(token_stats, inputs, **options), 0.0)


def test_one_statistic_alone_carries_gradient() -> None:
    inputs = with_leaves(head_inputs(0, (4, 6), 8, 33))
    function, _ = compiled(lambda: token_stats(**inputs).entropy.square().sum())
    expected = gradients(token_stats(**inputs).entropy.square().sum(), inputs)
    assert_same(gradients(function(), inputs), expected, 0.0)


def test_teacher_stats_at_any_length_are_compiled_twice_at_most() -> None:
    function, counter = compiled(teacher_stats)
    for length in LENGTHS:
        inputs = head_inputs(0, (length,), 8, 33)
        call = (inputs["hidden"], inputs["weight"].requires_grad_())
        options = {"teacher_bias": inputs["bias"], "mask": inputs["mask"], "temperature": 0.7}
        assert_same(function(*call, **options)._asdict(), teacher_stats(*call, **options)._asdict(), 0.0)
        assert counter.frame_count <= 2


def test_autocast_changes_nothing() -> None:
    inputs = cast(loss_inputs(0, (4, 6)), torch.float32)
    function, _ = compiled(srpo_loss)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(run_loss(function, inputs), run_loss(srpo_loss, inputs), 0.0)


def test_a_bad_value_raises_what_the_eager_call_raises() -> None:
    inputs = loss_inputs(0, (4, 6)) | {"mask": None}
    inputs["target_ids"][0, 1] = 33
    function, _ = compiled(srpo_loss)
    with pytest.raises(ValueError, match=r"target_ids must lie in \[0, 33\).*got 33 at row 1"):
        function(**inputs)


class Model(nn.Module):
    """A linear layer in the place of a language model, its head, and the loss."""

    def __init__(self, config: SRPOConfig) -> None:
        super().__init__()
        self.body, self.head, self.loss = nn.Linear(8, 8), nn.Linear(8, 33), SRPOLoss(config)

    def forward(self, states: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = torch.tanh(self.body(states))
        out = self.loss(hidden, self.head.weight, bias=self.head.bias, **inputs)
        return 2.0 * out.loss, {name: value + 0.0 for name, value in out.metrics.items()}


def train(backend: str | None) -> tuple[Results, int]:
    """Parameters and summed metrics after a few steps on batches of different lengths."""
    torch.manual_seed(0)
    model = Model(SRPOConfig(dw_beta=0.5))
    function, counter = (model, None) if backend is None else compiled(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    totals: Results = {}
    for seed, length in enumerate(LENGTHS):
        inputs = cast(loss_inputs(seed, (length, 3)), torch.float32)
        states = inputs.pop("hidden")
        loss, metrics = function(
            states, {k: v for k, v in inputs.items() if k not in ("weight", "bias") and v is not None}
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals = {name: totals.get(name, torch.zeros(())) + value for name, value in metrics.items()}
    parameters = {name: x.detach() for name, x in model.named_parameters()}
    return parameters | totals, 0 if counter is None else counter.frame_count


def test_a_compiled_train_step() -> None:
    expected, _ = train(None)
    actual, compilations = train("aot_eager")
    assert_same(actual, expected, 1e-6)
    assert compilations <= 2


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
# Else it first compiles a file for each of a CPU's instruction sets, to see which of them work.
@torch._inductor.config.patch({"cpp.vec_isa_ok": False})
def test_inductor() -> None:
    expected, _ = train(None)
    actual, compilations = train("inductor")
    assert_same(actual, expected, 1e-5)
    assert compilations <= 2
    inputs = cast(head_inputs(0, (4, 6), 8, 33), torch.float32)
    function, _ = compiled(token_stats, backend="inductor")
    assert_same(statistics_of(function, inputs), statistics_of(token_stats, inputs), 1e-6)
