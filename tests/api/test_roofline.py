"""The work and the bytes of a call that a report holds its times against."""

from __future__ import annotations

import csv
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from srpo_kernels.rows.spec import RowSpec
from srpo_kernels.verify import data_sheets, roofline
from srpo_kernels.verify.batches import Case, make_batch

COSTS = Path(__file__).parents[2] / "benchmarks" / "results" / "cost.csv"


@pytest.mark.parametrize("case", ["policy", "forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize(("provider", "itemsize"), [("srpo_kernels", 4), ("srpo_kernels-bf16", 2)])
def test_the_passes_bytes_are_those_that_the_interpreter_counted(provider: str, itemsize: int, case: Any) -> None:
    moved: Counter[str] = Counter()
    for line in csv.DictReader(COSTS.read_text().splitlines()):
        if (line["rows"], line["provider"]) == (case, provider) and line["metric"].endswith("_per_element"):
            moved[line["kernel"]] += int(line["value"])
    spec = RowSpec(divergence=None if case == "policy" else case)
    assert roofline.pass_bytes(case != "policy", spec, itemsize) == moved


def test_the_work_of_a_batch() -> None:
    batch = make_batch(Case("tiny", "routed", 128))
    taught, alone = int(batch.sdpo_rows.sum()), int(batch.active_policy_rows.sum())
    work = roofline.work_of(batch)
    assert work.flop == 2 * 500 * 32 * (4 * taught + 3 * alone)
    assert work.row_passes == 500 * (28 * taught + 12 * alone)
    # One chunk: dW is written once.
    assert work.head_gradient == 4 * 500 * 32
    assert roofline.head_gradient_bytes(8, 500, 32) == 15 * work.head_gradient
    sheet = data_sheets.DataSheet(2.0, 4.0)
    expected = work.flop / 4e12 + (work.row_passes + work.head_gradient) / 2e9
    assert math.isclose(work.seconds(sheet), expected)


@pytest.mark.parametrize(
    ("name", "sheet"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("AMD Instinct MI300X", "MI300X"),
        ("AMD EPYC, 2 threads", None),
    ],
)
def test_a_data_sheet_is_that_of_the_very_product(name: str, sheet: str | None) -> None:
    assert data_sheets.data_sheet(name) == data_sheets.DATA_SHEETS.get(sheet or "")
