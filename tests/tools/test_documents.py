"""Tables in terminals and files of any width."""

from __future__ import annotations

import io

import pandas as pd
import pytest

pytest.importorskip("rich", reason="commands print with rich")

from rich.console import Console

from tools.documents import print_table, rich_table

TABLE = rich_table(pd.DataFrame({f"column {i}": ["a long word"] for i in range(8)}), "title", "caption")


@pytest.mark.parametrize(("terminal", "width"), [(True, 60), (True, 200), (False, 60)])
def test_a_table_is_whole_or_says_how_to_see_it(terminal: bool, width: int) -> None:
    file = io.StringIO()
    print_table(Console(file=file, width=width, force_terminal=terminal, color_system=None), TABLE)
    cut = terminal and width == 60
    assert ("Cut to 60 columns of 113: widen the terminal" in file.getvalue()) == cut
    assert (file.getvalue().count("a long word") == 8) == (not cut)
