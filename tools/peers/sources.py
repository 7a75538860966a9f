"""Functions out of a file of a peer, without what the file imports."""

from __future__ import annotations
import __future__

import ast
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def functions_of(path: Path, names: Iterable[str], **namespace: Any) -> SimpleNamespace:
    """The named top-level functions of a file, undecorated, with ``namespace`` as their globals and each other."""
    if not path.is_file():
        raise SystemExit(f"{path} is no file: give the folder of a checkout or of an unpacked wheel")
    wanted = set(names)
    found = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) in wanted]
    missing = wanted - {node.name for node in found if isinstance(node, ast.FunctionDef)}
    if missing:
        raise SystemExit(f"{path} has no functions {sorted(missing)}: another version?")
    for node in found:
        assert isinstance(node, ast.FunctionDef)
        node.decorator_list = []
    code = compile(
        ast.Module(found, []), str(path), "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True
    )
    exec(code, namespace)
    return SimpleNamespace(**{name: namespace[name] for name in wanted})
