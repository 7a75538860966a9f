"""Tables for the terminal and for documents that hold generated ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

# Columns of output that goes to a file, at most.
_WIDEST = 200


def rich_table(cells: pd.DataFrame, title: str, caption: str) -> Table:
    """A table for the terminal."""
    table = Table(*cells.columns.map(str), title=title, caption=caption, box=box.SIMPLE_HEAD)
    for row in cells.itertuples(index=False):
        table.add_row(*map(str, row))
    return table


def print_table(console: Console, table: Table) -> None:
    """Print it, to a file as wide as it is. A terminal that is too narrow for it is told how to see the whole."""
    wanted = console.measure(table, options=console.options.update(max_width=_WIDEST)).maximum
    if not console.is_terminal:
        console.width = max(console.width, wanted)
    console.print(table)
    if wanted > console.width:
        console.print(f"Cut to {console.width} columns of {wanted}: widen the terminal, or pipe into less -S.")


def markdown_table(cells: pd.DataFrame, caption: str) -> str:
    """The same for a document: a sentence and the table."""
    rows = [list(cells.columns), ["---"] * len(cells.columns), *cells.itertuples(index=False)]
    return "\n".join([caption, "", *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def replace_marked(document: Path, contents: Mapping[str, str]) -> None:
    """Put each content between ``<!-- marker -->`` and ``<!-- /marker -->`` of a document: all of them, or none."""
    text = document.read_text()
    for marker, content in contents.items():
        start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
        before, found_start, rest = text.partition(start)
        _, found_end, after = rest.partition(end)
        if not (found_start and found_end):
            raise SystemExit(f"{document} has no {start} before {end}")
        text = f"{before}{start}\n{content}\n{end}{after}"
    document.write_text(text)
