"""What ``python -m srpo_kernels.verify --report`` found, for the documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from srpo_kernels.verify.device_report.render import tables


def whole(path: Path) -> str:
    """All tables of a report, one level down in the document, or how to make one."""
    if not path.exists():
        return "None is here: `python -m srpo_kernels.verify --report DIR`, on a CPU with `--sizes small`."
    content = _read(path)
    sizes = ", in small sizes: no time below is a GPU's" if content["identity"]["sizes"] == "small" else ""
    parts = [f"### {title}\n\n{body}" for title, body in tables(content).items()]
    return "\n\n".join([f"On {_where(content)}{sizes}.", *parts])


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _where(content: dict[str, Any]) -> str:
    identity = content["identity"]
    return f"{identity['device']}, {', '.join(f'{name} {x}' for name, x in identity['versions'].items())}"
