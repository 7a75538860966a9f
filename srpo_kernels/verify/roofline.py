"""What a step costs by count, and how long a device needs for it at the least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from srpo_kernels.engine import gemm
from srpo_kernels.engine.memory import RowMemory
from srpo_kernels.engine.order import RowOrder
from srpo_kernels.engine.plan import Plan, make_plan
from srpo_kernels.rows import torch_rows
from srpo_kernels.rows.dtypes import accumulation_dtype
from srpo_kernels.rows.passes import RowPasses
from srpo_kernels.rows.spec import RowSpec
from srpo_kernels.rows.vocabulary import Vocabulary
from srpo_kernels.verify.batches import Batch
from srpo_kernels.verify.data_sheets import DataSheet


@dataclass(frozen=True)
class Work:
    """``flop`` of the matmuls, and bytes beside their operands: of the row passes, and of dW where chunks add to it."""

    flop: float
    row_passes: float
    head_gradient: float

    def seconds(self, sheet: DataSheet) -> float:
        """At a device's peak rates, one after the other, as they run."""
        memory = (self.row_passes + self.head_gradient) / (1e9 * sheet.gigabytes_per_second)
        return self.flop / (1e12 * sheet.teraflops) + memory


def pass_bytes(taught: bool, spec: RowSpec, dlogits_itemsize: int) -> dict[str, int]:
    """What each pass over a row moves for an element of the vocabulary, with fp32 logits."""
    logits = 4 * (1 + taught)
    passes = {"row_stats": logits, "row_grad": logits + dlogits_itemsize}
    return passes | ({"row_mixture": logits} if taught and spec.mixture is not None else {})


def head_gradient_bytes(products: int, vocab_size: int, hidden_size: int) -> float:
    """Of dW in fp32: the first product writes it, each later one reads and writes it."""
    return 4.0 * vocab_size * hidden_size * max(2 * products - 1, 0)


def work(
    taught: int, alone: int, matmuls: int, head_products: int, *, head: Sequence[int], spec: RowSpec, itemsize: int
) -> Work:
    """Of rows with and without a teacher that take so many ``matmuls``, in units of ``H * V`` multiply-adds.

    dW is the sum of ``head_products``; ``head`` is its shape; ``itemsize`` that of dlogits.
    """
    vocab_size, hidden_size = head
    row_bytes = taught * sum(pass_bytes(True, spec, itemsize).values())
    row_bytes += alone * sum(pass_bytes(False, spec, itemsize).values())
    return Work(
        2.0 * vocab_size * hidden_size * matmuls,
        float(vocab_size * row_bytes),
        head_gradient_bytes(head_products, vocab_size, hidden_size),
    )


def work_of(batch: Batch) -> Work:
    """Of ``srpo_loss`` of a batch with the default workspace, forward and backward to dX and dW."""
    plan, config = plan_of(batch), batch.config
    return work(
        len(plan.order.taught),
        len(plan.order.alone),
        plan.student_products + plan.teacher_products,
        plan.head_products,
        head=batch.weight.shape,
        spec=RowSpec(config.transform, config.divergence, config.alpha),
        itemsize=gemm.dlogits_dtype(batch.weight, accumulation_dtype(batch.weight)).itemsize,
    )


def plan_of(batch: Batch) -> Plan:
    """How the engine lays out the rows of a batch."""
    taught, alone = (x.flatten().nonzero().squeeze(1) for x in (batch.sdpo_rows, batch.active_policy_rows))
    passes = RowPasses(torch_rows, Vocabulary.whole(len(batch.weight)))
    memory = RowMemory.of(batch.weight, accumulation_dtype(batch.weight), passes)
    return make_plan(RowOrder(taught, alone, alone[:0]), memory, workspace_bytes=None, gradients=2)
