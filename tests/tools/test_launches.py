"""``python -m tools.launches``: launches on paper, and the engine's among them."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

pytest.importorskip("triton")
pytest.importorskip("rich")

from tests.tools.test_gate import python
from tools.gate.targets import TARGETS
from tools.launches import __main__ as command
from tools.launches import sweep as launches

_COMPILED = """
import json
from srpo_kernels.kernels import launch
from tools.launches import sweep as launches
from tools.gate.targets import TARGETS

target = TARGETS["sm_90"]
wide = launch.TileLaunch(128, 256, 64, 8, 3)
own = launch.row_launch(1, "nvidia")
found = {
    "rows": launches._choice(target, "rows", 1, own, chosen=True),
    "few in flight": launches._choice(target, "rows", 1, launch.RowLaunch(32, 1), chosen=False),
    "wide": launches._choice(target, "tiles", 1, wide, chosen=False),
    "spills": launches._choice(target, "tiles", 2, wide, chosen=False),
}
print(json.dumps({name: choice and vars(choice) for name, choice in found.items()}))
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, float] | None]:
    done = python("-c", _COMPILED)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, float] | None] = json.loads(done.stdout)
    return found


def test_a_launch_has_a_time_on_paper(compiled: dict[str, dict[str, float] | None]) -> None:
    rows, few, wide = (compiled[name] for name in ("rows", "few in flight", "wide"))
    assert rows is not None and few is not None and wide is not None
    assert rows["time"] == 1.0 and rows["chosen"] and rows["lanes"] == 1_024
    # A warp of 32 lanes on each of 32 blocks: 16 KiB in flight of the 13 that hide the latency.
    assert few["time"] >= 1.0 and few["blocks"] == 32
    # 128 x 256 tiles read 3/4 of what 128 x 128 ones do.
    device = TARGETS["sm_90"].device
    assert device is not None
    expected = device.tensor_flop_per_clock * (1 / 128 + 1 / 256) / device.l2_bytes_per_clock
    assert wide["time"] == pytest.approx(expected, abs=1e-3)


def test_a_launch_that_spills_is_none(compiled: dict[str, dict[str, float] | None]) -> None:
    assert compiled["spills"] is None


def frame() -> pd.DataFrame:
    times = {1.0: False, 1.2: True, 1.1: False} | {2.0 + x: False for x in range(15)}
    line = {"target": "sm_90", "kind": "rows", "models": 1, "num_warps": 8, "num_stages": 1, "registers": 40}
    line |= dict.fromkeys(("block_rows", "block_vocab", "block_hidden", "spill_bytes"), 0) | {"blocks": 6}
    lines = [line | {"lanes": i, "time": time, "chosen": own} for i, (time, own) in enumerate(sorted(times.items()))]
    return pd.DataFrame(lines)


def test_the_ten_best_and_the_engines_are_kept() -> None:
    choices = frame()
    assert list(launches.best(choices)["lanes"]) == list(range(10))
    last = choices.assign(chosen=choices["lanes"] == 17)
    assert list(launches.best(last)["lanes"]) == [*range(10), 17]


def test_the_table_names_the_engines_and_the_best() -> None:
    assert "| sm_90 | rows, student | 2, 8 | 1.20 | 0, 8 | 1.00 | 18 |" in launches.table(frame())
    same = frame().assign(chosen=lambda x: x["lanes"] == 0)
    assert "| 0, 8 | 1.00 | the same | 1.00 | 18 |" in launches.table(same)


def test_a_target_without_a_data_sheet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no data sheet of sm_86: there is one of sm_80, sm_90, gfx942"):
        command.main(["--targets", "sm_86", "--csv", str(tmp_path / "x.csv"), "--docs", str(tmp_path / "x.md")])
    assert not list(tmp_path.iterdir())


def test_the_document_has_the_table_of_the_results() -> None:
    """Of the ten best: the engine's, the best one and their times are there."""
    document = command.DOCUMENT.read_text()
    for (target, kind, models), group in pd.read_csv(command.RESULTS).groupby(["target", "kind", "models"]):
        what = f"{kind}, {'student' if models == 1 else 'student and teacher'}"
        own = group[group["chosen"]].iloc[0]
        best = "the same" if own.time <= group.iloc[0].time else launches._name(group.iloc[0])
        start = f"| {target} | {what} | {launches._name(own)} | {own.time:.2f} | {best} | {group.iloc[0].time:.2f} |"
        assert start in document, start
