"""Options of a command from the fields of a class."""

from __future__ import annotations

import inspect
import os
import shutil
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import tyro

T = TypeVar("T")


def parse(what: Callable[..., T], prog: str, arguments: Sequence[str] | None = None, *, config: Any = ()) -> T:
    """``tyro.cli``, whose ``--help`` begins with the docstring of ``what``, in lines that fit the terminal.

    Where NO_COLOR is set, tyro, which does not know it, and rich take the terminal for one without any escape codes.
    """
    if os.environ.get("NO_COLOR"):
        os.environ["TERM"] = "dumb"
    width = min(shutil.get_terminal_size().columns, 80)
    paragraphs = (inspect.getdoc(what) or "").split("\n\n")
    # Tyro joins lines to one that is as long as the text, but for those that begin with a space.
    fill = partial(textwrap.fill, width=width, initial_indent=" ", subsequent_indent=" ")
    description = "\n\n".join(fill(" ".join(paragraph.split())) for paragraph in paragraphs)
    return tyro.cli(what, prog=prog, description=description, args=arguments, config=config)
