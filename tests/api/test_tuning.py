"""``verify --tune``: launches of a file of ``tools.launches``, timed on the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from srpo_kernels.kernels import rows, tiles
from srpo_kernels.verify import report, tuning
from srpo_kernels.verify.__main__ import main
from tests.devices import COMPILED

pytestmark = pytest.mark.interpreter

CPU = torch.device("cpu")
HEADER = (
    "target,kind,models,lanes,block_rows,block_vocab,block_hidden,num_warps,num_stages,registers,spill_bytes,blocks,"
    "time,chosen\n"
)
LINES = """sm_90,rows,1,64,0,0,0,2,1,40,0,6,1.0,True
sm_90,rows,1,16,0,0,0,1,1,40,0,8,1.2,False
sm_90,rows,2,32,0,0,0,2,1,60,0,4,1.0,True
sm_90,tiles,1,0,16,16,16,4,2,128,0,2,1.5,True
sm_90,tiles,1,0,16,10,16,4,2,128,0,2,1.4,False
sm_90,tiles,2,0,16,16,16,4,2,128,0,1,1.5,True
"""


@pytest.fixture
def choices(tmp_path: Path) -> Path:
    path = tmp_path / "launches.csv"
    path.write_text(HEADER + LINES)
    return path


def test_each_launch_is_timed_in_the_place_of_the_engines(choices: Path) -> None:
    row_launch, tile_launch = rows.row_launch, tiles.tile_launch
    size = tuning.Size(rows=3, vocab_size=40, hidden_size=16)
    tuned = list(tuning.tune(tuning.read_choices(choices, "sm_90"), CPU, size))
    assert (rows.row_launch, tiles.tile_launch) == (row_launch, tile_launch)
    assert [x.launch for x in tuned[:2]] == ["64 lanes, 2 warps", "16 lanes, 1 warps"]
    # A block is a power of two: what a compiler refuses has a reason in place of a rate.
    (refused,) = [x for x in tuned if x.rate is None]
    assert refused.launch == "16 × 10 × 16, 4 warps, 2 stages" and refused.reason
    assert all(x.rate > 0 for x in tuned if x.rate is not None)
    console = Console(record=True, width=100)
    report.print_tuned(console, tuned)
    printed = console.export_text()
    for title in ("rows, student", "rows, student and teacher", "tiles, student", "tiles, student and teacher"):
        assert title in printed
    assert printed.count("(the engine's)") == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("a,b\n1,2\n", "no file of python -m tools.launches"),
        (HEADER, "no file of"),
        (HEADER + LINES.replace("sm_90", "gfx942"), "launches for gfx942, and none for this device's sm_90"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "launches.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        tuning.read_choices(path, "sm_90")


@pytest.mark.skipif(COMPILED, reason="there is a GPU")
def test_without_a_gpu_nothing_is_timed(choices: Path) -> None:
    with pytest.raises(SystemExit, match="needs a GPU that Triton compiles for"):
        main(["--tune", str(choices)])
    with pytest.raises(SystemExit, match="no other option than --device"):
        main(["--tune", str(choices), "--quick"])
