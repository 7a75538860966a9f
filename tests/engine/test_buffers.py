"""What a call works on belongs to it alone: buffers, the tensors it reads again, the results it hands out."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from srpo_kernels import SRPOConfig, SRPOLoss, release_workspace, srpo_loss, teacher_stats, token_stats
from srpo_kernels.engine.backends import rows_of
from srpo_kernels.rows.contract import RowGradients
from srpo_kernels.rows.passes import Request, RowPasses
from srpo_kernels.rows.spec import RowSpec
from srpo_kernels.rows.vocabulary import Vocabulary
from tests.comparison import assert_same, gradients, run_loss, run_stats, with_leaves
from tests.inputs import Inputs, for_backend, head_inputs, loss_inputs
from tests.strategies import each_backend

UPSTREAM = torch.linspace(-1.0, 1.0, 3 * 24, dtype=torch.float64).view(3, 4, 6)


@pytest.fixture(autouse=True)
def fresh_buffer() -> None:
    release_workspace()


@each_backend
@pytest.mark.parametrize("factor", [0.25, -3.0])
def test_a_loss_that_is_changed_in_place(factor: float, backend: str) -> None:
    expected = run_loss(srpo_loss, for_backend(loss_inputs(), backend), backend=backend)
    inputs = with_leaves(for_backend(loss_inputs(), backend))
    loss = srpo_loss(**inputs, backend=backend).loss
    loss *= factor
    results = gradients(loss, inputs)
    assert_same(results, {name: factor * expected[name] for name in results}, 1e-6)


@each_backend
def test_statistics_that_are_changed_in_place(backend: str) -> None:
    inputs = for_backend(head_inputs(0, (4, 6), 8, 33), backend)
    expected = run_stats(token_stats, inputs, UPSTREAM, backend=backend)
    inputs = with_leaves(inputs)
    stats = token_stats(**inputs, backend=backend)
    total = inputs["hidden"].new_zeros(())
    for value, upstream in zip(stats[:3], UPSTREAM, strict=True):
        assert value is not None
        value *= upstream.to(value)
        total = total + value.sum()
    assert stats.teacher_entropy is not None
    stats.teacher_entropy.zero_()
    results = gradients(total, inputs)
    assert_same(results, {name: expected[name] for name in results}, 1e-6)


@each_backend
@pytest.mark.parametrize(
    "name", ["hidden", "weight", "bias", "target_ids", "mask", "teacher_hidden", "teacher_weight", "teacher_bias"]
)
def test_what_the_backward_reads_again_must_not_change(name: str, backend: str, device: torch.device) -> None:
    inputs = with_leaves(for_backend(head_inputs(0, (4, 6), 8, 33, 5), backend))
    # Copies of them would not change.
    inputs = {
        key: x if x is None else x.detach().to(device).requires_grad_(x.requires_grad) for key, x in inputs.items()
    }
    stats = token_stats(**inputs, backend=backend)
    assert stats.divergence is not None
    with torch.no_grad():
        inputs[name].copy_(inputs[name].flip(0))
    with pytest.raises(RuntimeError, match=r"in.?place") as error:
        (stats.log_probs + stats.divergence).sum().backward()
    if name not in ("hidden", "weight", "bias"):
        assert name in str(error.value)


def test_states_of_a_teacher_from_inference_mode() -> None:
    inputs = head_inputs(0, (4, 6), 8, 33, 5)
    expected = run_stats(token_stats, inputs, UPSTREAM)
    with torch.inference_mode():
        teacher = {name: inputs[name] * 1.0 for name in ("teacher_hidden", "teacher_weight", "teacher_bias")}
    assert_same(run_stats(token_stats, inputs | teacher, UPSTREAM), expected, 0.0)


@each_backend
def test_a_call_within_another(backend: str) -> None:
    """A hook on what the model saves may call the library itself, to count or to compress."""
    teacher = {name: torch.randn(9, 7) for name in ("teacher_hidden", "teacher_weight")}
    inputs = for_backend(loss_inputs(), backend)
    expected = run_loss(srpo_loss, inputs, backend=backend)

    def packed(x: Tensor) -> Tensor:
        teacher_stats(**teacher, backend=backend)
        return x

    with saved_tensors_hooks(packed, packed):
        assert_same(run_loss(srpo_loss, inputs, backend=backend), expected, 0.0)

    class Calling(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.overloadpacket is torch.ops.aten.mm:
                teacher_stats(**teacher, backend="torch")
            return function(*args, **kwargs or {})

    with Calling():
        assert_same(run_loss(srpo_loss, inputs, backend=backend), expected, 0.0)
        results = run_stats(token_stats, for_backend(head_inputs(0, (4, 6), 8, 33), backend), UPSTREAM, backend=backend)
    assert_same(results, run_stats(token_stats, for_backend(head_inputs(0, (4, 6), 8, 33), backend), UPSTREAM,
                                   backend=backend), 0.0)  # fmt: skip


@each_backend
def test_calls_of_several_threads(backend: str) -> None:
    cases = [for_backend(loss_inputs(seed), backend) for seed in range(4)]
    expected = [run_loss(srpo_loss, case, backend=backend) for case in cases]
    results: list[Any] = [None] * len(cases)

    def work(i: int) -> None:
        results[i] = run_loss(srpo_loss, cases[i], backend=backend)

    # Triton's interpreter patches modules while it runs a kernel: one thread at a time.
    for i in range(len(cases)):
        thread = threading.Thread(target=work, args=(i,))
        thread.start()
        thread.join()
    for result, right in zip(results, expected, strict=True):
        assert_same(result, right, 0.0)


@each_backend
def test_a_default_device_is_not_the_data_s(backend: str) -> None:
    inputs = for_backend(loss_inputs(), backend)
    expected = run_loss(srpo_loss, inputs, backend=backend)
    stats_inputs = for_backend(head_inputs(0, (4, 6), 8, 33), backend)
    expected_stats = run_stats(token_stats, stats_inputs, UPSTREAM, backend=backend)
    release_workspace()
    with torch.device("meta"):
        leaves = with_leaves(inputs)
        loss = srpo_loss(**leaves, backend=backend).loss
        actual = gradients(loss, leaves)
    assert_same(actual, {name: expected[name] for name in actual}, 0.0)
    assert_same(run_stats(token_stats, stats_inputs, UPSTREAM, backend=backend), expected_stats, 0.0)
    try:
        torch.set_default_device("meta")
        actual = run_loss(srpo_loss, inputs, backend=backend)
    finally:
        torch.set_default_device(None)
    assert_same(actual, expected, 0.0)
    assert_same(run_loss(srpo_loss, inputs, backend=backend), expected, 0.0)


@each_backend
def test_a_call_in_inference_mode_leaves_nothing_to_the_next(backend: str) -> None:
    inputs = for_backend(loss_inputs(), backend)
    expected = run_loss(srpo_loss, inputs, backend=backend)
    release_workspace()
    with torch.inference_mode():
        srpo_loss(**inputs, backend=backend)
    assert_same(run_loss(srpo_loss, inputs, backend=backend), expected, 0.0)


def test_a_default_dtype_is_not_the_data_s() -> None:
    inputs = loss_inputs()
    expected = run_loss(srpo_loss, for_backend(inputs, "triton"))
    torch.set_default_dtype(torch.float64)
    try:
        actual = run_loss(SRPOLoss(SRPOConfig()), for_backend(inputs, "triton"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(actual, expected, 0.0)


def test_a_buffer_that_is_read_as_something_else_raises() -> None:
    """What the torch passes leave in place of the logits is named, and a gradient asks for what it needs."""
    passes, ids = RowPasses(rows_of("torch"), Vocabulary.whole(9)), torch.zeros(2, dtype=torch.int64)
    ones, logits = torch.ones(2), torch.randn(2, 9)

    def gradient(z: Tensor, stats: Any, spec: RowSpec, **gradients: Tensor) -> Tensor:
        request = Request(z, z.clone(), spec, ids)
        dlogits = passes.dlogits_(request, stats, RowGradients(**gradients), out=z)
        return dlogits.values if dlogits.factor is None else dlogits.values * dlogits.factor

    def statistics(z: Tensor, *gradients: str, entropy: bool = False) -> Any:
        return passes.statistics(Request(z, None, RowSpec(), ids, entropy, frozenset(gradients)))[0]

    exact = torch.nn.functional.one_hot(ids, 9) - logits.softmax(1)
    for entropy in (False, True):
        z = logits.clone()
        stats = statistics(z, "log_probs", entropy=entropy)
        torch.testing.assert_close(gradient(z, stats, RowSpec(), log_probs=ones), exact)
    z = logits.clone()
    stats = statistics(z, "log_probs")
    with pytest.raises(RuntimeError, match=r"the buffer holds probabilities, of which no gradient of .*entropy"):
        gradient(z, stats, RowSpec(), log_probs=ones, entropy=ones)
    spec = RowSpec(divergence="jsd")
    both = logits.clone(), logits.clone()
    (stats,) = passes.statistics(Request(*both, spec, ids, gradient=frozenset()))
    with pytest.raises(RuntimeError, match="the buffer holds nothing of use, of which no gradient of divergence"):
        gradient(both[0], stats, spec, divergence=ones)
    (stats,) = passes.statistics(Request(*both, spec, ids, gradient=frozenset({"divergence"})))
    with pytest.raises(RuntimeError, match="no gradient of log-probs and divergence can be made"):
        gradient(both[0], stats, spec, log_probs=ones, divergence=ones)


def test_an_optimizer_step_between_forward_and_backward_does_not_matter_to_the_loss() -> None:
    inputs: Inputs = with_leaves(loss_inputs())
    expected = gradients(srpo_loss(**inputs).loss, inputs)
    loss = srpo_loss(**inputs).loss
    with torch.no_grad():
        for name in ("weight", "teacher_hidden", "advantages"):
            inputs[name].zero_()
    assert_same(gradients(loss, inputs), expected, 0.0)
