"""``python -m srpo_kernels.verify``: what it reports where all holds, and where something is off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("tyro")

from srpo_kernels import rows_torch
from srpo_kernels.rows import Dlogits
from srpo_kernels.verify.__main__ import main


def run(path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the JSON of a quick run on the CPU."""
    code = main(["--device", "cpu", "--quick", "--no-timing", "--json", str(path / "verify.json"), *arguments])
    return code, json.loads((path / "verify.json").read_text())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_everything_holds(backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = run(tmp_path, "--backend", backend, "--only", "teacher_stats", "policy loss", "repeated runs")
    assert code == 0
    assert "PASS" in capsys.readouterr().out
    checks = document["checks"]
    assert {check["kind"] for check in checks} == {"parity", "determinism"}
    assert {check["dtype"] for check in checks} == {"fp32", "bf16"}
    assert {check["backend"] for check in checks} == {backend}


def test_a_gradient_that_is_a_little_off_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = rows_torch.log_prob_gradient_

    def wrong(*args: Any, **kwargs: Any) -> Dlogits:
        values, factor = right(*args, **kwargs)
        return Dlogits(values, None if factor is None else factor * 1.001)

    monkeypatch.setattr(rows_torch, "log_prob_gradient_", wrong)
    code, document = run(tmp_path, "--backend", "torch", "--only", "policy loss")
    assert code == 1
    assert "grad" in capsys.readouterr().out
    assert not all(check["passed"] for check in document["checks"])


def test_an_exception_is_a_failure_of_its_check_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(rows_torch, "log_prob_gradient_", broken)
    code, document = run(tmp_path, "--backend", "torch", "--only", "policy loss", "teacher_stats")
    assert code == 1
    assert "no such kernel" in capsys.readouterr().out
    assert any(check["passed"] for check in document["checks"])
