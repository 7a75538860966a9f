"""Every number in the prose of README and docs has a source in docs/numbers.toml, which says the same."""

from __future__ import annotations

import csv
import tomllib
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tests.docs.sources import KINDS, ROOT, claims, fault, faults, literals, places, printed, prose, values

ENTRIES: dict[str, list[dict[str, Any]]] = tomllib.loads((ROOT / "docs" / "numbers.toml").read_text())
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
)
# More than this many numbers of which nobody knows the source are not to be.
MOST_UNSOURCED = 0


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_number_has_a_source_that_says_the_same(document: str) -> None:
    found = faults((ROOT / document).read_text(), ENTRIES.get(document, []))
    assert not found, "\n".join(found)


def test_the_manifest_is_of_documents_that_are_there() -> None:
    assert set(ENTRIES) <= set(DOCUMENTS)


def test_numbers_without_a_source_become_no_more() -> None:
    unsourced = [
        f"{name}: {entry['text']}" for name, entries in ENTRIES.items() for entry in entries if "unsourced" in entry
    ]
    print(*unsourced, sep="\n")
    assert len(unsourced) <= MOST_UNSOURCED


def test_what_was_measured_by_hand_is_used_and_says_when() -> None:
    with (ROOT / "benchmarks" / "results" / "measured.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names)
    used = " ".join(
        entry.get("measured", "") + " " + entry.get("formula", "") for entries in ENTRIES.values() for entry in entries
    )
    assert set(names) <= set(used.replace(",", " ").split())
    for row in rows:
        assert date.fromisoformat(row["date"])
        assert all(row[column] for column in ("what", "machine", "commit", "command")), row["name"]


# The functions that the tests above stand on.

TEXT = """# 77 headings

A step takes 1.04 × the time
of its products, `code 88` and [99 names](66.md) aside, at 576 × 49,152, with torch 2.13 and TRL >= 1.16.

<!-- table -->
| 55 | 44 |
<!-- /table -->

```
33
```

It has two parts, 3 products and 640 MiB; +1.2 points, 2 to 4 ms, 6.0 · 10⁻⁸, 2⁻²², 1e-9, and Qwen3-0.6B's fp32.
"""
STEP = {"text": "takes {1.04} × the time of", "formula": "1.0435"}
REST = {"text": "and 640 MiB; +1.2 points, 2 to 4 ms, 6.0 · 10⁻⁸, 2⁻²², 1e-9", "defined": "an example"}
LINK = {"text": "[99 names]", "defined": "an example"}


def numbers_of(text: str) -> list[str]:
    words = prose(text)[1]
    return [words[start:end] for start, end, _ in claims(words)]


def test_what_is_a_claim() -> None:
    expected = ["1.04", "99", "640", "+1.2", "2", "4", "6.0 · 10⁻⁸", "2⁻²²", "1e-9"]
    assert numbers_of(TEXT) == expected
    assert numbers_of(
        "D = 3 · 10⁻⁸, V = 151,936, TRL 5.6 and 7.8 times, arXiv 2604.02288, in 2026, lines 20 to 30.\n"
    ) == [
        "3 · 10⁻⁸",
        "5.6",
        "7.8",
    ]


@pytest.mark.parametrize(
    ("number", "value", "half"),
    [
        ("1.04", 1.04, 0.005),
        ("1,284", 1284.0, 0.5),
        ("−1.2", -1.2, 0.05),
        ("5e-6", 5e-6, 5e-7),
        ("6.0 · 10⁻⁸", 6e-8, 5e-10),
        ("2⁻²²", 2.0**-22, 2.0**-23),
        ("−10⁻⁴", -1e-4, 5e-5),
    ],
)
def test_printed_numbers(number: str, value: float, half: float) -> None:
    assert printed(number) == pytest.approx((value, half), rel=1e-12)


def test_a_document_whose_numbers_have_sources() -> None:
    assert faults(TEXT, [STEP, REST, LINK]) == []


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([REST, LINK], "1.04 has no source: A step takes"),
        ([{**STEP, "formula": "1.046"}, REST, LINK], "says 1.04, its source 1.046"),
        ([STEP, REST, LINK, {**STEP, "text": "takes {1.05} × the time"}], "occurs 0 times"),
        ([STEP, REST, LINK, {"text": "and", "defined": "x"}], "occurs 4 times"),
        ([{**STEP, "defined": "x"}, REST, LINK], "must name one source, names ['formula', 'defined']"),
        ([{"text": "takes {1.04} ×"}, REST, LINK], "must name one source, names []"),
        ([{**STEP, "formula": "1.04, 2"}, REST, LINK], "marks 1 numbers, its source has 2"),
        ([{**STEP, "formula": "gone / 2"}, REST, LINK], "NameError"),
        ([{"text": "{1.04} × the", "measured": "gone"}, REST, LINK], "KeyError"),
        ([{"text": "{1.04} × the", "csv": "gone.csv", "where": {}}, REST, LINK], "FileNotFoundError"),
        ([{"text": "{1.04} × the", "test": "tests/docs/test_numbers.py::test_gone"}, REST, LINK], "there is no tests/"),
        ([{"text": "{1.04} × the", "code": "tests/devices.py"}, REST, LINK], "devices.py has no 1.04"),
    ],
)
def test_what_is_wrong_is_found(entries: Sequence[dict[str, Any]], message: str) -> None:
    assert any(message in line for line in faults(TEXT, entries)), faults(TEXT, entries)


SPEED = {
    "csv": "speed.csv",
    "where": {"head": "qwen3-0.6b", "workload": "routed", "provider": "naive", "metric": "ratio_to_bare"},
}
STEPS = "sections/step: qwen3-8b, policy, bfloat16/result/"


@pytest.mark.parametrize(
    ("entry", "right", "wrong"),
    [
        (SPEED, "3.8", "3.6"),
        ({**SPEED, "per": {"provider": "srpo_kernels"}}, "3.6", "3.8"),
        ({**SPEED, "minus": {"provider": "srpo_kernels"}}, "2.7", "2.8"),
        ({"csv": "gate.csv", "where": {"spill_bytes": "0"}, "take": "count"}, "1,284", "1,285"),
        ({"csv": "launches.csv", "where": {"target": "sm_80"}, "column": "registers", "take": "max"}, "255", "1"),
        ({"csv": "launches.csv", "where": {"target": "sm_80"}, "column": "registers", "take": "mean"}, "115.3", "1"),
        ({"json": "gpu.json", "where": f"{STEPS}rows"}, "8,192", "8,191"),
        ({"code": "srpo_kernels/engine/memory.py:_DEFAULT_WORKSPACE_CPU", "unit": "MiB"}, "640", "641"),
        ({"code": "srpo_kernels/losses/config.py:SRPOConfig.epsilon_high"}, "0.28", "0.27"),
        ({"code": "srpo_kernels/integrations/trl/config.py:SRPOTrainerConfig.teacher_update_rate"}, "0.05", "0.06"),
        ({"measured": "demo_minutes"}, "5", "6"),
        ({"formula": "h100_tile_256 / h100_tile_product", "unit": "%"}, "80", "81"),
        ({"test": "tests/rows/test_accuracy.py::test_divergences"}, "2⁻²²", "2⁻³⁰"),
    ],
    ids=lambda value: next((kind for kind in KINDS if kind in value), "") if isinstance(value, dict) else value,
)
def test_a_number_beside_each_kind_of_source(entry: dict[str, Any], right: str, wrong: str) -> None:
    assert fault({"text": f"it has {{{right}}} parts", **entry}, f"it has {right} parts") is None
    assert fault({"text": f"it has {{{wrong}}} parts", **entry}, f"it has {wrong} parts") is not None


def test_a_row_that_is_not_the_only_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rows of speed\.csv have"):
        values({"csv": "speed.csv", "where": {"head": "qwen3-0.6b"}})


def test_values_below_0_and_numbers_in_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("name,median,high,reason\na,-0.25,0.5,\nb,,,needs about 28 GiB\n")
    assert values({"csv": str(path), "where": {"name": "a"}}) == [-0.25]
    assert values({"csv": str(path), "where": {"name": "a"}, "column": "high, median", "unit": "%"}) == [50.0, -25.0]
    assert values({"csv": str(path), "where": {"name": "b"}, "column": "reason"}) == [28.0]


def test_literals_of_a_module() -> None:
    found = literals(ROOT / "tests" / "rows" / "test_accuracy.py")
    assert 2.0**-22 in found
    assert 2.0**-30 not in found


def test_several_numbers_of_a_fragment() -> None:
    assert places("a {1} and {2}", "a 1\nand 2 parts") == [(2, 3), (8, 9)]
