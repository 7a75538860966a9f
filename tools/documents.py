"""Tables for the terminal and for documents that hold generated ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from rich import box
from rich.table import Table


def rich_table(cells: pd.DataFrame, title: str, caption: str) -> Table:
    """A table for the terminal."""
    table = Table(*cells.columns.map(str), title=title, caption=caption, box=box.SIMPLE_HEAD)
    for row in cells.itertuples(index=False):
        table.add_row(*map(str, row))
    return table


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
