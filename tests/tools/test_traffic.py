"""The traffic meter: exact counts on known kernels, and the peers' kernels metered on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from tools.interpreter.traffic import Traffic, measure_traffic, trl_kernels_on_cpu  # noqa: E402

pytestmark = pytest.mark.interpreter

FP32 = 4


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_range = offsets < size
    x = tl.load(x_ptr + offsets, mask=in_range)
    y = tl.load(y_ptr + offsets, mask=in_range)
    tl.store(out_ptr + offsets, x + y, mask=in_range)


@triton.jit
def matmul_kernel(a_ptr, b_ptr, out_ptr, k, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    m, n, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, k, BLOCK_K):
        a = tl.load(a_ptr + m[:, None] * k + start + inner[None, :])
        b = tl.load(b_ptr + (start + inner)[:, None] * N + n[None, :])
        total = tl.dot(a, b, total)
    tl.store(out_ptr + m[:, None] * N + n[None, :], total)


@triton.jit
def block_pointer_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    x = tl.make_block_ptr(x_ptr, (size,), (1,), (0,), (BLOCK,), (0,))
    out = tl.make_block_ptr(out_ptr, (size,), (1,), (0,), (BLOCK,), (0,))
    tl.store(out, tl.load(x, boundary_check=(0,)), boundary_check=(0,))


@triton.jit
def descriptor_kernel(x_ptr, out_ptr, rows, columns, M: tl.constexpr, N: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [rows, columns], [columns, 1], [M, N])
    out = tl.make_tensor_descriptor(out_ptr, [rows, columns], [columns, 1], [M, N])
    out.store([0, 0], x.load([0, 0]))


@triton.jit
def count_kernel(count_ptr, first_ptr):
    tl.atomic_add(count_ptr, 1)
    tl.atomic_cas(first_ptr, 0, 1)


def name(kernel) -> str:
    return f"{__name__}.{kernel.__name__}"


def test_a_masked_vector_add_counts_its_valid_elements_alone():
    x, y, out = torch.randn(3, 1000)
    with measure_traffic() as traffic:
        for _ in range(2):
            add_kernel[(8,)](x, y, out, 1000, BLOCK=128)
    assert torch.equal(out, x + y)
    assert traffic == {name(add_kernel): Traffic(2, 16, 2 * 2 * 1000 * FP32, 2 * 1000 * FP32, 0)}


def test_a_product_counts_operands_once_per_tile_and_two_flops_per_multiply_add():
    a, b, out = torch.randn(16, 64), torch.randn(64, 32), torch.empty(16, 32)
    with measure_traffic() as traffic:
        matmul_kernel[(1,)](a, b, out, 64, M=16, N=32, BLOCK_K=16)
    torch.testing.assert_close(out, a @ b)
    expected = Traffic(1, 1, (16 * 64 + 64 * 32) * FP32, 16 * 32 * FP32, 2 * 16 * 32 * 64)
    assert traffic == {name(matmul_kernel): expected}


def test_items_count_with_their_own_size():
    x, y, out = torch.randn(3, 100).half()
    with measure_traffic() as traffic:
        add_kernel[(1,)](x, y, out, 100, BLOCK=128)
    assert traffic[name(add_kernel)].bytes_loaded == 2 * 100 * 2


def test_block_pointers_count_what_their_boundary_check_leaves():
    x, out = torch.randn(2, 100)
    with measure_traffic() as traffic:
        block_pointer_kernel[(1,)](x, out, 100, BLOCK=128)
    assert torch.equal(out, x)
    assert traffic == {name(block_pointer_kernel): Traffic(1, 1, 100 * FP32, 100 * FP32)}


def test_tensor_descriptors_count_what_lies_in_their_shape():
    x, out = torch.randn(2, 3, 12)
    with measure_traffic() as traffic:
        descriptor_kernel[(1,)](x, out, 3, 12, M=4, N=16)
    assert torch.equal(out, x)
    assert traffic == {name(descriptor_kernel): Traffic(1, 1, 36 * FP32, 36 * FP32)}


def test_an_atomic_is_a_load_and_a_store():
    count, first = torch.zeros(2, 1, dtype=torch.int32)
    with measure_traffic() as traffic:
        count_kernel[(2, 3)](count, first)
    assert (count.item(), first.item()) == (6, 1)
    assert traffic == {name(count_kernel): Traffic(1, 6, 2 * 6 * 4, 2 * 6 * 4)}


def test_nothing_is_counted_after_the_block():
    x, y, out = torch.randn(3, 8)
    with measure_traffic() as traffic:
        pass
    add_kernel[(1,)](x, y, out, 8, BLOCK=8)
    assert traffic == {}


def test_trl_log_probs_are_metered():
    logprob = pytest.importorskip("trl.kernels.chunked_logprob")
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(40, 8)
    ids = torch.tensor([0, 7, 39])
    with measure_traffic() as traffic, trl_kernels_on_cpu():
        log_probs, *_ = logprob.ChunkedLogProbFunction.apply(hidden, weight, None, ids, 1.0, 16, None, 1.0, ())
        log_probs.sum().backward()
    expected = (hidden @ weight.T).log_softmax(-1)[torch.arange(3), ids]
    torch.testing.assert_close(log_probs, expected)
    forward = traffic["trl.kernels.chunked_logprob._forward_kernel"]
    # Vocabulary chunks of 16, 16 and 8, each reading its logits once.
    assert (forward.launches, forward.programs) == (3, 9)
    assert forward.bytes_loaded > 3 * 40 * FP32
    backward = traffic["trl.kernels.chunked_logprob._backward_kernel"]
    assert (backward.launches, backward.bytes_stored) == (3, 3 * 40 * FP32)


def test_trl_divergence_is_metered():
    chunked_divergence = pytest.importorskip("trl.kernels.chunked_divergence")
    hidden, teacher_hidden = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8)
    weight = torch.randn(40, 8)
    apply = chunked_divergence.ChunkedDivergenceFunction.apply
    expected, _ = apply(hidden, weight, None, teacher_hidden, weight, None, 0.5)
    with measure_traffic() as traffic, trl_kernels_on_cpu():
        divergence, _ = apply(hidden, weight, None, teacher_hidden, weight, None, 0.5)
        divergence.sum().backward()
    torch.testing.assert_close(divergence, expected)
    module = "trl.kernels.chunked_divergence"
    assert set(traffic) == {f"{module}.{kernel}" for kernel in ("_stats_kernel", "_jsd_kernel", "_backward_kernel")}
    # 7 running statistics of a row beside both models' logits.
    assert traffic[f"{module}._stats_kernel"] == Traffic(1, 3, 3 * (2 * 40 + 7) * FP32, 3 * 7 * FP32)


def test_liger_cross_entropy_is_metered():
    cross_entropy = pytest.importorskip("liger_kernel.ops.cross_entropy")
    logits, ids = torch.randn(3, 40), torch.tensor([0, 7, 39])
    expected = torch.nn.functional.cross_entropy(logits, ids)
    with measure_traffic() as traffic:
        loss, *_ = cross_entropy.LigerCrossEntropyFunction.apply(logits.requires_grad_(), ids, None)
    torch.testing.assert_close(loss, expected)
    kernel = traffic["liger_kernel.ops.cross_entropy.liger_cross_entropy_kernel"]
    # Logits twice, the target's id and its logit; the gradient, the target's again and the loss.
    assert kernel == Traffic(1, 3, 3 * (2 * 40 * FP32 + 8 + FP32), 3 * (40 + 2) * FP32)


def test_compiled_kernels_are_refused():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    code = "from tools.interpreter.traffic import measure_traffic\nmeasure_traffic().__enter__()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2]
    )
    assert "RuntimeError: kernels are compiled here: set TRITON_INTERPRET=1" in done.stderr
