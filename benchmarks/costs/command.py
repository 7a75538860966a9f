"""The sub-command that prints the cost sheet."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from benchmarks.costs import CASES, PROVIDERS, CaseName, ProviderName
from tools.documents import markdown_table, replace_marked, rich_table

# Columns of output that goes to a file.
_FILE_WIDTH = 200
_MARKER = "cost:traffic"


def cost(
    cases: tuple[CaseName, ...] = CASES,
    providers: tuple[ProviderName, ...] = PROVIDERS,
    csv: Path | None = None,
    docs: Path | None = None,
) -> None:
    """Costs of one step that no hardware changes: products, memory traffic, launches and workspace.

    Kernels run in Triton's interpreter, on the CPU, on small batches; costs are per row and vocabulary element.

    Args:
        cases: kinds of rows: GRPO's clipped ratio, or one of the divergences.
        providers: what to measure; `srpo_kernels-bf16` is with a model in bf16, all others with one in fp32.
        csv: file to write, a line per number.
        docs: Markdown file whose tables to replace, between `<!-- cost:traffic -->` and `<!-- /cost:traffic -->`.
    """
    # Triton reads it at its first import, which the other sub-commands must be able to do without it.
    os.environ["TRITON_INTERPRET"] = "1"
    from benchmarks.costs.sheet import measure_sheet
    from tools.interpreter import shortcuts

    shortcuts.install()

    console = Console()
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    with console.status("starting") as status:
        sheet = measure_sheet(cases, providers, status.update)
    tables = sheet.tables()
    for name, (cells, caption) in tables.items():
        console.print(rich_table(cells, name, caption))
    if csv is not None:
        csv.parent.mkdir(parents=True, exist_ok=True)
        sheet.lines().to_csv(csv, index=False, float_format="%.6g")
    if docs is not None:
        replace_marked(docs, {_MARKER: "\n\n".join(markdown_table(*table) for table in tables.values())})
