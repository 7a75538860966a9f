"""The table of docs/gpu.md that ``python -m tools.chunks`` writes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from srpo_kernels.engine.plan import row_chunks
from srpo_kernels.rows.spec import RowSpec
from srpo_kernels.verify.data_sheets import DATA_SHEETS, DataSheet
from srpo_kernels.verify.roofline import Work, head_gradient_bytes, work
from tools.documents import markdown_table, replace_marked

DOCUMENT = Path(__file__).parents[2] / "docs" / "gpu.md"
MARKER = "chunks"

ROWS = 8_192
# Rows that one product of dW takes.
PRODUCT_ROWS = (1_024, 2_048, 4_096, 8_192)
# Rows of fp32 logits that are alive, of one model or of both together.
LOGITS_ROWS = 2_048
# Of the peak: 8,192 x 4,096 x 151,936 in bf16, whose three products took an H100 42 ms.
_ACHIEVED = 6.0 * ROWS * 4_096 * 151_936 / 42e-3 / (1e12 * DATA_SHEETS["H100"].teraflops)
_DLOGITS = torch.bfloat16


class Step(NamedTuple):
    """A batch of ``ROWS`` rows of one kind on a head ``[V, H]``."""

    name: str
    taught: bool
    spec: RowSpec
    head: tuple[int, int]


STEPS = (
    Step("policy", False, RowSpec(), (151_936, 4_096)),
    Step("jsd", True, RowSpec(divergence="jsd"), (128_256, 4_096)),
)


def work_in(step: Step, product_rows: int) -> Work:
    """Of a step whose products of dW take so many rows."""
    taught, alone = (ROWS, 0) if step.taught else (0, ROWS)
    matmuls, products = ROWS * (4 if step.taught else 3), len(row_chunks(ROWS, product_rows))
    return work(taught, alone, matmuls, products, head=step.head, spec=step.spec, itemsize=_DLOGITS.itemsize)


def seconds(made: Work, sheet: DataSheet) -> float:
    """Matmuls at the rate that was achieved, and memory traffic at the data sheet's, one after the other."""
    return made.seconds(sheet._replace(teraflops=_ACHIEVED * sheet.teraflops))


def workspace_bytes(step: Step, product_rows: int) -> int:
    """Logits of both models that are alive, and the dlogits that wait."""
    logits = 4 * min(LOGITS_ROWS, (1 + step.taught) * product_rows)
    return step.head[0] * (logits + _DLOGITS.itemsize * product_rows)


def table() -> str:
    """A line for each device and step."""
    lines = []
    for name, sheet in DATA_SHEETS.items():
        for step in STEPS:
            made = {rows: work_in(step, rows) for rows in PRODUCT_ROWS}
            any_size = made[PRODUCT_ROWS[0]]
            vocab_size, hidden_size = step.head
            line = {
                "device": name,
                "rows": f"{step.name}, {hidden_size:,} × {vocab_size:,}",
                "matmuls": f"{1e3 * any_size.flop / (1e12 * _ACHIEVED * sheet.teraflops):.1f}",
                "row passes": f"{1e3 * any_size.row_passes / (1e9 * sheet.gigabytes_per_second):.1f}",
            }
            lines.append(line | {f"{rows:,}": f"{1e3 * seconds(x, sheet):.1f}" for rows, x in made.items()})
    memory = "; ".join(
        f"{step.name} " + ", ".join(f"{workspace_bytes(step, rows) / 2**20:,.0f}" for rows in PRODUCT_ROWS)
        for step in STEPS
    )
    dw = head_gradient_bytes(1, *STEPS[0].head) / 1e9
    return markdown_table(
        pd.DataFrame(lines),
        f"Milliseconds of {ROWS:,} rows: matmuls at {_ACHIEVED:.0%} of the data sheet's rate, which an H100 is known "
        "to reach at this size; row passes at its bandwidth; and the whole with so many rows to a product of dW, "
        f"{dw:.1f} GB in fp32 at the larger vocabulary. Workspace of these numbers of rows, in MiB: {memory}.",
    )


def write() -> None:
    """Put the table into the document."""
    replace_marked(DOCUMENT, {MARKER: table()})
