"""The products: logits, dX and dW, with results in the accumulation dtype.

The accumulation dtype is fp32, or fp64 when an input is fp64. Operands keep the model's dtype where the device has a
product of low-precision operands with an fp32 result, a *mixed* product; elsewhere the weight is widened slab by slab,
never as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from srpo_kernels.rows.contract import Dlogits
from srpo_kernels.rows.segments import add_rows_

MixedProducts = Literal["addmm", "mm", "none"]

# Elements of one widened slab of the weight, or of a product that waits to be added: 32 MiB in fp32.
_SLAB_ELEMENTS = 1 << 23


def operand_dtype(weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which hidden states are multiplied with ``weight`` for logits in ``dtype``."""
    halves = weight.dtype in (torch.bfloat16, torch.float16)
    if halves and dtype == torch.float32 and mixed_products(weight.device, weight.dtype) != "none":
        return weight.dtype
    return dtype


def dlogits_dtype(weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of dlogits, and of what they are multiplied with for dX and dW.

    That of the logits' operands, unless it is fp16: dlogits of a mean over many tokens lie below its smallest number.
    """
    operand = operand_dtype(weight, dtype)
    return dtype if operand == torch.float16 else operand


def mixed_products(device: torch.device, dtype: torch.dtype) -> MixedProducts:
    """What ``device`` makes of operands in ``dtype``, bf16 or fp16, and an fp32 result; it is asked once.

    - ``"addmm"``: products, alone or added to an fp32 matrix: CUDA from torch 2.10 on.
    - ``"mm"``: products alone: CUDA with torch 2.8 and 2.9, which add to a matrix in the operands' dtype only.
    - ``"none"``: ROCm with a torch of before late 2025, bf16 on NVIDIA GPUs before Ampere, and CPUs, where widened
      operands are faster.
    """
    return "none" if device.type == "cpu" else _ask(device, dtype)


@cache
def _ask(device: torch.device, dtype: torch.dtype) -> MixedProducts:
    # Results are strided, as the rows of logits are.
    x = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.ones(16, 32, dtype=torch.float32, device=device)[:, :16]
    # What fails here, as where memory is short, is no answer.
    torch.mm(total, total)
    try:
        torch.mm(x, x, out_dtype=torch.float32, out=total)
        # A result in another dtype than it is said to have is no product.
        if not bool((total == 16).all()):
            return "none"
    except RuntimeError:
        return "none"
    try:
        torch.addmm(total, x, x, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return "mm"
    return "addmm" if bool((total == 32).all()) else "mm"


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """``out = hidden @ weight.T + bias``: ``[n, H]``, ``[V, H]``, ``[V]``, ``[n, V]``; ``hidden`` is an operand."""
    for ids, slab in _slabs(weight, hidden.dtype):
        _mm(hidden, slab.t(), out=out[:, ids])
    if bias is not None:
        out.add_(bias)


def backproject(dlogits: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out = dlogits @ weight``: ``[n, V]``, ``[V, H]``, ``[n, H]``."""
    for ids, slab in _slabs(weight, dlogits.dtype):
        if ids.start:
            _addmm(dlogits[:, ids], slab, out=out)
        else:
            _mm(dlogits[:, ids], slab, out=out)


def _slab_height(matrix: Tensor) -> int:
    """Rows of a matrix that are widened, or added to, at a time."""
    return max(1, _SLAB_ELEMENTS // matrix.shape[1])


class HeadGradient:
    """dW ``[V, H]`` and db ``[V]``, summed over chunks of rows in the accumulation dtype.

    The first chunk writes, later ones add. dW is None where it is not wanted, and until it has content: rows of it are
    added to zeros, which an allocator has at a lower price than a pass.
    """

    def __init__(self, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight: Tensor | None = None
        self.bias = None if bias is None else torch.zeros(bias.shape, dtype=dtype, device=bias.device)
        self._like, self._dtype = weight, dtype
        # What the next addition multiplies dW by.
        self._beta = 1.0

    def rescale(self, factor: Tensor) -> None:
        """Multiply what is there."""
        if self.bias is not None:
            self.bias.mul_(factor)
        if self.weight is None:
            return
        if self.weight.device.type == "cpu":
            self._beta = factor.item()
        else:
            # A factor that the host reads would stall the accelerator's queue.
            self.weight.mul_(factor)

    def add_weight(self, dlogits: Tensor, hidden: Tensor) -> None:
        """Add ``dlogits.T @ hidden``: operands ``[n, V]`` and ``[n, H]``; ``hidden`` takes the dtype of dlogits."""
        if self._like is None:
            return
        hidden = hidden.to(dlogits.dtype)
        if self.weight is None:
            self.weight = torch.empty(self._like.shape, dtype=self._dtype, device=self._like.device)
            _mm(dlogits.t(), hidden, out=self.weight)
        else:
            _addmm(dlogits.t(), hidden, out=self.weight, beta=self._beta)
            self._beta = 1.0

    def add_rows(self, ids: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
        """Add dlogits ``[n, K]`` of tokens ``ids`` ``[n, K]`` of n hidden states ``[n, H]``, and to db."""
        if self.bias is not None:
            add_rows_(self.bias, ids.flatten(), dlogits.flatten())
        if self._like is None:
            return
        if self.weight is None:
            self.weight = self._zeros(self._like)
        self._apply_beta()
        height = max(1, 2 * _SLAB_ELEMENTS // (ids.shape[1] * hidden.shape[1]))
        for at, values, states in zip(ids.split(height), dlogits.split(height), hidden.split(height), strict=True):
            add_rows_(self.weight, at.flatten(), (values[:, :, None] * states[:, None]).flatten(0, 1))

    def add_bias(self, dlogits: Dlogits) -> None:
        """Add the column sums of dlogits."""
        if self.bias is None:
            return
        if dlogits.factor is None:
            self.bias += dlogits.values.sum(0, dtype=self.bias.dtype)
        elif self.bias.device.type == "xpu":
            # There addmv_ reads the vector that it writes; mended in May 2026 (pytorch/pytorch#182287).
            self.bias += torch.mv(dlogits.values.t(), dlogits.factor.squeeze(1))
        else:
            self.bias.addmv_(dlogits.values.t(), dlogits.factor.squeeze(1))

    def finish(self) -> None:
        """Make what was added complete, and the gradient of no rows at all a zero."""
        if self.weight is None and self._like is not None:
            self.weight = self._zeros(self._like)
        self._apply_beta()

    def _apply_beta(self) -> None:
        if self.weight is not None and self._beta != 1.0:
            self.weight.mul_(self._beta)
            self._beta = 1.0

    def _zeros(self, like: Tensor) -> Tensor:
        return torch.zeros(like.shape, dtype=self._dtype, device=like.device)


def _slabs(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Vocabulary slices of ``weight`` in ``dtype``; the whole of it when it already is."""
    vocab_size = len(weight)
    if weight.dtype == dtype:
        yield slice(0, vocab_size), weight
        return
    height = _slab_height(weight)
    for start in range(0, vocab_size, height):
        ids = slice(start, min(start + height, vocab_size))
        yield ids, weight[ids].to(dtype)


def _mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _addmm(a: Tensor, b: Tensor, out: Tensor, beta: float = 1.0) -> None:
    """``out = beta * out + a @ b``."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=beta)
    elif mixed_products(out.device, a.dtype) == "addmm":
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    else:
        height = _slab_height(out)
        for a_rows, rows in zip(a.split(height), out.split(height), strict=True):
            torch.add(torch.mm(a_rows, b, out_dtype=out.dtype), rows, alpha=beta, out=rows)
