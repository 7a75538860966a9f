"""The steps that are metered: one kind of rows, forward and backward to dX and dW, by each provider."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import srpo_kernels as sk
from benchmarks.costs import CASES, CaseName, ProviderName
from srpo_kernels.engine import gemm
from srpo_kernels.verify.batches import Batch
from srpo_kernels.verify.providers import Step, autograd_step, fused, naive
from tools.interpreter.traffic import trl_kernels_on_cpu

# Less than any number of rows: buffers of logits, not dW, make the peak of memory.
HIDDEN_SIZE = 2

_ALPHAS: dict[CaseName, float] = {"jsd": 0.5, "forward_kl": 0.0, "reverse_kl": 1.0}

# Rows × columns whose logits are alive at a time; C rows by ``workspace_bytes``.
CHUNKS: dict[tuple[ProviderName, CaseName], str] = {}
# What a step lacks of the loss, or does beside it.
REMARKS: dict[tuple[ProviderName, CaseName], str] = {}
for _case in CASES:
    CHUNKS["srpo_kernels", _case] = CHUNKS["srpo_kernels-bf16", _case] = "C × V"
    CHUNKS["trl", _case] = "4,096 × 32,768"
    CHUNKS["naive", _case] = "N × V"
    CHUNKS["liger", _case] = "N × V" if _case == "policy" else "N·H/V × V"
    REMARKS["srpo_kernels-bf16", _case] = "dlogits in bf16"
    REMARKS["naive", _case] = "operators of torch, unfused"
    if _case == "policy":
        REMARKS["liger", _case] = "advantages per sequence alone"
    else:
        REMARKS["trl", _case] = "2 products and passes for log-probs and teacher entropy"
        REMARKS["liger", _case] = "sum of divergences alone: no weights per token, log-probs, teacher entropy"


def make_batch(case: CaseName, rows: int, vocab_size: int, dtype: torch.dtype = torch.float32) -> Batch:
    """One sequence of ``rows`` tokens, all of one kind and all active."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return Batch(
        hidden=randn(1, rows, HIDDEN_SIZE).requires_grad_(),
        weight=randn(vocab_size, HIDDEN_SIZE).requires_grad_(),
        teacher_hidden=randn(1, rows, HIDDEN_SIZE),
        target_ids=torch.randint(vocab_size, (1, rows), generator=generator),
        mask=torch.ones(1, rows, dtype=torch.bool),
        sdpo_mask=torch.tensor([case != "policy"]),
        advantages=torch.ones(1),
        old_log_probs=torch.full((1, rows), -math.log(vocab_size)),
        distills=case != "policy",
        config=sk.SRPOConfig.from_alpha(_ALPHAS.get(case, 0.5)),
    )


def prepare(
    provider: ProviderName, case: CaseName, rows: int, vocab_size: int
) -> AbstractContextManager[tuple[Step, Batch]]:
    """The step of a provider and its batch; to be run while the context lasts.

    Entering raises ImportError where the provider is not installed.
    """
    return _PREPARE[provider](case, rows, vocab_size)


@contextmanager
def _fused(case: CaseName, rows: int, vocab_size: int) -> Iterator[tuple[Step, Batch]]:
    batch = make_batch(case, rows, vocab_size)
    yield autograd_step(partial(fused.loss, backend="triton"), batch), batch


@contextmanager
def _fused_bf16(case: CaseName, rows: int, vocab_size: int) -> Iterator[tuple[Step, Batch]]:
    batch = make_batch(case, rows, vocab_size, torch.bfloat16)
    with bf16_products():
        yield autograd_step(partial(fused.loss, backend="triton"), batch), batch


@contextmanager
def bf16_products() -> Iterator[None]:
    """As on a GPU: operands of products, dlogits among them, in bf16; logits and everything else in fp32."""
    with patch.object(gemm, "mixed_products", lambda device, dtype: "addmm"), _WideningProducts():
        yield


class _WideningProducts(TorchDispatchMode):
    """Gives the CPU the GPU's products of bf16 operands with an fp32 result."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.ops.aten.mm.dtype_out:
            return torch.mm(args[0].float(), args[1].float(), out=kwargs["out"])
        if func == torch.ops.aten.addmm.dtype_out:
            return torch.addmm(args[0], args[1].float(), args[2].float(), **kwargs)
        return func(*args, **kwargs)


@contextmanager
def _trl(case: CaseName, rows: int, vocab_size: int) -> Iterator[tuple[Step, Batch]]:
    from srpo_kernels.verify.providers import trl_kernels

    batch = make_batch(case, rows, vocab_size)
    with (
        trl_kernels_on_cpu(),
        # One chunk: the buffers are allocated for whole chunks, however few columns there are.
        patch.object(trl_kernels, "_VOCAB_CHUNK", vocab_size),
        patch("trl.kernels.chunked_divergence.VOCAB_CHUNK_SIZE", vocab_size),
    ):
        yield autograd_step(partial(trl_kernels.loss, packed=True), batch), batch


@contextmanager
def _liger(case: CaseName, rows: int, vocab_size: int) -> Iterator[tuple[Step, Batch]]:
    from liger_kernel.ops import fused_linear_jsd
    from liger_kernel.ops.grpo_loss import GrpoLossFunction

    def policy_loss(batch: Batch) -> tuple[Tensor, None]:
        # It takes the position behind the last token too.
        logits = torch.nn.functional.pad(batch.hidden, (0, 0, 0, 1)) @ batch.weight.T
        low, high = batch.config.epsilon_low, batch.config.epsilon_high
        arguments = (batch.old_log_probs, None, batch.target_ids, batch.advantages, None, 1.0, 0.0, low, high)
        loss, *_ = GrpoLossFunction.apply(logits, *arguments, True, "dapo")
        return loss, None

    def divergence(batch: Batch) -> tuple[Tensor, None]:
        hidden, teacher_hidden = batch.hidden[0], batch.teacher_hidden[0]
        weight = batch.weight
        loss = fused_linear_jsd.LigerFusedLinearJSDFunction.apply(
            hidden, weight, teacher_hidden, weight.detach(), None, _ALPHAS[case], -100, 1.0, None, "triton"
        )
        return loss, None

    batch = make_batch(case, rows, vocab_size)
    # One chunk: their number is otherwise V / H, with the factor of the GPU.
    with (
        patch.object(fused_linear_jsd, "_max_capability", lambda device: 103),
        patch.object(fused_linear_jsd, "_CHUNK_MEM_CONST_B300", vocab_size),
        # It tells which of its other backends cannot be imported, and subtracts infinities in masked lanes.
        patch.object(logging.getLogger("liger_kernel.backends.registry"), "disabled", True),
        np.errstate(invalid="ignore"),
    ):
        yield autograd_step(policy_loss if case == "policy" else divergence, batch), batch


@contextmanager
def _naive(case: CaseName, rows: int, vocab_size: int) -> Iterator[tuple[Step, Batch]]:
    batch = make_batch(case, rows, vocab_size)
    yield autograd_step(naive.loss, batch), batch


_PREPARE: dict[ProviderName, Callable[[CaseName, int, int], AbstractContextManager[tuple[Step, Batch]]]] = {
    "srpo_kernels": _fused,
    "srpo_kernels-bf16": _fused_bf16,
    "trl": _trl,
    "liger": _liger,
    "naive": _naive,
}
