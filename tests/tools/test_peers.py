"""``python -m tools.peers``: what TRL has to call agrees, and what differs is found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tools.peers import trl
from tools.peers.batches import Comparison, compare
from tools.peers.sources import functions_of

pytest.importorskip("trl", reason="TRL's own functions")


@pytest.mark.parametrize("comparison", trl.comparisons(), ids=lambda comparison: comparison.ours)
def test_trls_functions_agree(comparison: Comparison) -> None:
    assert max(compare(comparison, 50).values()) < 1e-6


def test_a_difference_is_found() -> None:
    comparison = Comparison("", "", "", lambda batch, x: x.exp(), lambda batch, x: x.exp() * (1 + 1e-4))
    assert all(9e-5 < value < 1.1e-4 for value in compare(comparison, 5).values())


def test_functions_come_without_what_their_file_imports(tmp_path: Path) -> None:
    file = tmp_path / "theirs.py"
    file.write_text(
        "import nowhere_to_be_found\n\n"
        "@nowhere_to_be_found.decorated\ndef double(x: Missing) -> Missing:\n    return once(x) + once(x)\n\n"
        "def once(x):\n    return torch.as_tensor(x)\n"
    )
    found = functions_of(file, ("double", "once"), torch=torch)
    assert found.double(2) == 4
    with pytest.raises(SystemExit, match=r"has no functions \['thrice'\]"):
        functions_of(file, ("thrice",))
    with pytest.raises(SystemExit, match="is no file"):
        functions_of(tmp_path / "nothing.py", ())
