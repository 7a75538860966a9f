"""The table of docs/losses.md that ``python -m tools.losses`` writes."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pandas as pd

from srpo_kernels.losses.policy import POLICY_LOSSES
from srpo_kernels.losses.registry import PolicyLoss
from tools.documents import markdown_table, replace_marked

DOCUMENT = Path(__file__).parents[2] / "docs" / "losses.md"
MARKER = "policy-losses"


def policy_losses() -> str:
    """The table: a line per registered loss, from its docstring and its flags."""
    cells = pd.DataFrame([_line(loss) for loss in POLICY_LOSSES.values()])
    return markdown_table(cells, "`rho` is the ratio, `A` the advantage, `sg` a stop-gradient.")


def _line(loss: PolicyLoss) -> dict[str, str]:
    text = " ".join((inspect.getdoc(loss.function) or "").split()).replace("``", "`").replace("|", r"\|")
    found = re.fullmatch(r"(?P<formula>.*?)\s*Source: (?P<source>.*?)\.\s*Elsewhere: (?P<elsewhere>.*)\.", text)
    if found is None:
        raise SystemExit(f"the docstring of {loss.name} must end in 'Source: ... Elsewhere: ...', got {text!r}")
    options = [f"`{name}`" for name in loss.fields] + [f"`{name}={value:g}`" for name, value in loss.options.items()]
    return {
        "`loss_type`": f"`{loss.name}`",
        "formula": found["formula"],
        "options": ", ".join(options) or "none",
        "source": found["source"],
        "elsewhere": found["elsewhere"],
        "matmuls per row": _matmuls(loss),
    }


def _matmuls(loss: PolicyLoss) -> str:
    if loss.whole_batch:
        return "3; 4 where the policy rows do not fit a chunk"
    if loss.whole_sequences:
        return "3; 4 in a sequence that does not fit a chunk"
    return "3"


def write() -> None:
    """Put the table into the document."""
    replace_marked(DOCUMENT, {MARKER: policy_losses()})
