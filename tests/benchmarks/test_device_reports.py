"""Reports of devices in the documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pandas", reason="the report's tables need the extra bench")

from benchmarks import RESULTS, device_reports
from srpo_kernels.engine import memory
from srpo_kernels.verify.device_report.render import failures
from tools.chunks import table as chunks

ROOT = Path(__file__).parents[2]

STEP = {
    "name": "qwen3-8b, policy, bfloat16",
    "hidden_size": 4_096,
    "vocab_size": 151_936,
    "rows": 8_192,
    "work": {"flop": 3.06e13, "row_passes": 1e10, "head_gradient": 1e10},
    "seconds_at_peak": 0.04,
    "providers": {
        "bare": {"seconds": {"median": 0.042}},
        "srpo_kernels": {"reason": "RuntimeError: no such [kernel]", "failed": True},
        "srpo_kernels-triton": {
            "seconds": {"median": 0.046}, "ratio_to_bare": {"median": 1.1}, "peak_mib": 3_200.4, "errors": {},
        },
        "quack": {"reason": "not installed: quack"},
    },
}  # fmt: skip


def report_of(tmp_path: Path, **changes: Any) -> Path:
    content = {
        "identity": {"device": "NVIDIA H100 80GB HBM3", "sizes": "gpu", "versions": {"torch": "2.11.0"}},
        "sections": {"step: a": {"state": "done", "seconds": 1.0, "result": STEP}},
        "missing": ["more parity: srpo_loss, fp32"],
        "kernels": {},
    }
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(content | changes))
    return path


def test_a_document_has_a_devices_steps_and_what_failed(tmp_path: Path) -> None:
    text = device_reports.whole(report_of(tmp_path))
    assert text.startswith("On NVIDIA H100 80GB HBM3, torch 2.11.0.\n")
    assert "`srpo_kernels`: RuntimeError: no such [kernel]" in text
    step = "qwen3-8b, policy, bfloat16, 4,096 × 151,936, 8,192 rows"
    assert "| step | bare, ms | at peak, ms | bare, TFLOP/s | `srpo_kernels-triton` |\n" in text
    assert f"| {step} | 42 | 40 | 729 | 1.10 / 3,200 |\n" in text
    small = {"device": "an EPYC", "sizes": "small", "versions": {"torch": "2.13.0"}}
    text = device_reports.whole(report_of(tmp_path, identity=small))
    assert text.startswith("On an EPYC, torch 2.13.0, in small sizes: no time below is a GPU's.")


def test_where_there_is_none_the_command_is_named(tmp_path: Path) -> None:
    assert "verify --report DIR`" in device_reports.whole(tmp_path / "small.json")


def test_the_documents_have_what_is_there() -> None:
    # README says that every check held.
    report = json.loads((RESULTS / "gpu.json").read_text())
    assert report["identity"]["sizes"] == "gpu" and not failures(report)
    for name in ("gpu.json", "small.json"):
        assert device_reports.whole(RESULTS / name) in (ROOT / "docs" / "gpu.md").read_text()
    assert chunks.table() in (ROOT / "docs" / "gpu.md").read_text()


def test_the_chunks_of_the_table_are_the_planners() -> None:
    assert chunks.LOGITS_ROWS == memory._ROWS_ACCELERATOR
    assert memory._ROWS_OF_PRODUCT in chunks.PRODUCT_ROWS
    policy = chunks.STEPS[0]
    few, one = (chunks.work_in(policy, rows).head_gradient for rows in (1_024, chunks.ROWS))
    assert few == 15 * one == 15 * 4 * 151_936 * 4_096
    # fp32 logits and bf16 dlogits, as the planner has them.
    assert chunks.workspace_bytes(policy, 1_024) == 1_024 * 151_936 * 6
