"""The sub-command that prints the cost sheet."""

from __future__ import annotations

import os

from rich.console import Console

from benchmarks.options import Cost
from tools.documents import markdown_table, print_table, replace_marked, rich_table

_MARKER = "cost:traffic"


def cost(options: Cost) -> None:
    """What ``Cost`` describes."""
    # Triton reads it at its first import, which the other sub-commands must be able to do without it.
    os.environ["TRITON_INTERPRET"] = "1"
    from benchmarks.costs.sheet import measure_sheet
    from tools.interpreter import shortcuts

    shortcuts.install()

    console = Console()
    with console.status("starting") as status:
        sheet = measure_sheet(options.cases, options.providers, status.update)
    tables = sheet.tables()
    for name, (cells, caption) in tables.items():
        print_table(console, rich_table(cells, name, caption))
    if options.csv is not None:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        sheet.lines().to_csv(options.csv, index=False, float_format="%.6g")
    if options.docs is not None:
        replace_marked(options.docs, {_MARKER: "\n\n".join(markdown_table(*table) for table in tables.values())})
