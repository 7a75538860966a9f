"""What ``python -m srpo_kernels.verify --report`` found, for the documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from srpo_kernels.verify.device_report.render import failures, steps_table, tables

# Of the README: the torch backend, which is not the one of GPUs, and TRL without padding, which it drops there itself.
_LEFT_OUT = ("srpo_kernels", "trl-packed")


def summary(path: Path) -> str:
    """The README's section of a GPU: its whole steps, or a line that says that there are none."""
    if not path.exists():
        return (
            "No GPU has been measured. On one, `python -m srpo_kernels.verify --report DIR` takes ten minutes, and "
            "`benchmarks/results/gpu.json` is where its `report.json` belongs."
        )
    content = _read(path)
    if content["identity"]["sizes"] != "gpu":
        raise SystemExit(f"{path} is a report of small sizes on {content['identity']['device']}, not of a GPU")
    found = failures(content)
    held = f"{len(found)} failures: {'; '.join(found)}" if found else "Every check held"
    missing = f" Not measured: {', '.join(content['missing'])}." if content["missing"] else ""
    return f"On {_where(content)}. {held}.{missing}\n\n{steps_table(content, _LEFT_OUT)}"


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
