"""dX, dW and db of a call, from dlogits that come chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_kernels.engine import gemm
from srpo_kernels.engine.batch import Head, Needs
from srpo_kernels.rows.contract import Dlogits


class Gradients:
    """Gradients of hidden states and head, in the accumulation dtype.

    dlogits that take their logits' place go into the products at once. Others wait in ``waiting`` ``[m, V]`` until
    it is full: every product of dW after the first reads and writes all of it in fp32. For the same reason nothing that
    waits is rescaled: ``scale``, None for 1, is what all gradients are still to be multiplied by.

    Args:
        of_rows: ``[n, H]`` for dX, ``[n, 1]`` for the sums of dlogits where hidden states are frozen, None for neither.
        head: what dX is taken by.
        needs: what is wanted.
        dtype: the accumulation dtype.
        waiting: of no row where dlogits take their logits' place.
    """

    def __init__(self, of_rows: Tensor | None, head: Head, needs: Needs, dtype: torch.dtype, waiting: Tensor) -> None:
        self.rows, self.of_hidden = of_rows, needs.hidden
        self.head = gemm.HeadGradient(head.weight if needs.weight else None, head.bias if needs.bias else None, dtype)
        self.scale: Tensor | None = None
        self._weight, self._waiting = head.weight, waiting
        self._chunks: list[tuple[Tensor, Tensor]] = []
        self._count = 0

    def place(self, logits: Tensor) -> Tensor:
        """Where the dlogits of a chunk with these logits ``[n, V]`` belong: over them, or behind those that wait."""
        if not len(self._waiting):
            return logits
        if self._count + len(logits) > len(self._waiting):
            self._multiply_waiting()
        return self._waiting[self._count : self._count + len(logits)]

    def add(self, rows: Tensor, dlogits: Dlogits, operand: Tensor) -> None:
        """Add those of ``rows``: dlogits, which are where ``place`` has said, and their logits' operand ``[n, H]``."""
        if not len(self._waiting):
            self._multiply(rows, dlogits, operand)
            return
        self._chunks.append((rows, operand))
        self._count += len(operand)

    def rescale(self, factor: Tensor) -> None:
        """Multiply all that was added before; what is added from now on is to be divided by a ``scale``."""
        if len(self._waiting):
            self.scale = factor if self.scale is None else self.scale * factor
            return
        if self.rows is not None:
            self.rows.mul_(factor)
        self.head.rescale(factor)

    def finish(self) -> None:
        """Make what was added complete."""
        self._multiply_waiting()
        self.head.finish()

    def _multiply_waiting(self) -> None:
        if not self._count:
            return
        rows, operands = zip(*self._chunks, strict=True)
        self._multiply(torch.cat(rows), Dlogits(self._waiting[: self._count], None), torch.cat(operands))
        self._chunks, self._count = [], 0

    def _multiply(self, rows: Tensor, dlogits: Dlogits, operand: Tensor) -> None:
        values, factor = dlogits
        if self.rows is not None:
            if self.of_hidden:
                grad = self.rows.new_empty(operand.shape)
                gemm.backproject(values, self._weight, out=grad)
            else:
                grad = values.sum(1, keepdim=True, dtype=self.rows.dtype)
            self.rows[rows] = grad if factor is None else grad.mul_(factor)
        self.head.add_weight(values, operand if factor is None else operand * factor)
        self.head.add_bias(dlogits)
