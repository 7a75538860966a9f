"""``python -m srpo_kernels.verify`` passes here, and says so when something is wrong."""

from __future__ import annotations

import itertools
import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from srpo_kernels.rows import torch_rows
from srpo_kernels.rows.contract import Dlogits
from srpo_kernels.verify import machine, plain, report, timing
from srpo_kernels.verify.__main__ import main
from srpo_kernels.verify.checks import Check
from srpo_kernels.verify.timing import Timing
from tests.devices import COMPILED

TORCH = ("--device", "cpu", "--backend", "torch", "--quick", "--no-timing")
OPS = {"srpo_loss", "fused_loss", "token_stats", "teacher_stats"}

Run = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit code, JSON and printed text of a command line."""

    def run_main(*arguments: str) -> tuple[int, dict[str, Any], str]:
        path = tmp_path / "outcome.json"
        code = main([*arguments, "--json", str(path)])
        return code, json.loads(path.read_text()), capsys.readouterr().out

    return run_main


@pytest.fixture
def tiny_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "shape_for", lambda *_: timing.Shape(64, 100, 16, torch.float32))


def scaled(function: Callable[..., Dlogits], factor: Callable[[], float]) -> Callable[..., Dlogits]:
    """A row pass whose gradient is multiplied."""

    def wrapped(*arguments: Any, **options: Any) -> Dlogits:
        values, rest = function(*arguments, **options)
        return Dlogits(values.mul_(factor()), rest)

    return wrapped


@pytest.mark.parametrize("workload", timing.WORKLOADS)
def test_what_is_timed_in_plain_torch_is_the_loss(workload: str) -> None:
    shape = timing.Shape(64, 100, 16, torch.float64)
    inputs = timing._make_inputs(workload, shape, torch.device("cpu"))
    leaves = [inputs["hidden"], inputs["weight"]]
    actual = plain.srpo_loss(**inputs)
    expected = reference.srpo_loss(**inputs).loss
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves))


def test_every_function_holds_on_torch(run: Run, tiny_timing: None) -> None:
    code, outcome, text = run("--device", "cpu", "--backend", "torch", "--quick")
    assert code == 0, outcome["failures"]
    assert outcome["passed"]
    assert outcome["failures"] == []
    assert {check["op"] for check in outcome["checks"]} == OPS
    assert {check["kind"] for check in outcome["checks"]} == {"parity", "determinism"}
    assert all(check["passed"] for check in outcome["checks"])
    last = text.strip().splitlines()[-1]
    assert last.startswith("PASS")
    assert f"{len(outcome['checks'])} checks" in last


def test_the_json_has_everything(run: Run, tiny_timing: None) -> None:
    _, outcome, _ = run("--device", "cpu", "--backend", "torch", "--quick", "--only", "policy loss")
    assert set(outcome) == {
        "passed", "seconds", "device", "versions", "backends", "interpreted", "dtypes", "absent", "products", "checks",
        "timing", "failures",
    }  # fmt: skip
    assert outcome["device"]["type"] == "cpu"
    assert outcome["backends"] == ["torch"]
    assert outcome["absent"]["triton"] == "not asked for"
    assert outcome["products"]["fp32"] == "fp32"
    assert outcome["products"]["bf16"] == "bf16 weights are widened to fp32, 32 MiB at a time"
    assert {"python", "torch", "triton", "srpo_kernels"} <= set(outcome["versions"])
    assert set(outcome["checks"][0]) == {field.name for field in fields(Check)} | {"ratio", "passed"}
    assert {check["dtype"] for check in outcome["checks"]} == {"fp32", "bf16"}
    assert outcome["timing"]["skipped"] is None
    assert set(outcome["timing"]["shape"]) == {"rows", "vocab_size", "hidden_size", "dtype"}
    rows = outcome["timing"]["rows"]
    assert [(row["workload"], row["implementation"]) for row in rows] == list(
        itertools.product(timing.WORKLOADS, (timing.PLAIN, "torch"))
    )
    assert set(rows[0]) == {field.name for field in fields(Timing)}
    assert all(row["milliseconds"] > 0 and row["peak_mib"] > 0 for row in rows)


@pytest.mark.parametrize(("answer", "words"), [("addmm", "in the same product"), ("mm", "in blocks of 32 MiB")])
def test_the_products_of_a_gpu_are_named(answer: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Turing has none for bf16.
    answers = {torch.bfloat16: "none", torch.float16: answer}
    monkeypatch.setattr(machine, "mixed_products", lambda device, dtype: answers[dtype])
    found = machine._products(torch.device("cuda"), list(machine.DTYPES))
    assert list(found) == ["fp32", "bf16", "fp16"]
    assert found["bf16"].startswith("bf16 weights are widened")
    assert found["fp16"] == "fp16 operands with an fp32 result for logits; dX and dW from fp32"
    answers = {torch.bfloat16: answer, torch.float16: "none"}
    assert words in machine._products(torch.device("cuda"), [torch.bfloat16])["bf16"]


def test_tf32_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {}
    for precision in ("highest", "high"):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        names |= {precision: machine._products(torch.device("cuda"), [torch.float32])["fp32"]}
    assert names["highest"] == "fp32"
    assert names["high"].startswith("TF32 or less")
    check = Check("parity", "token_stats", "divergence", "jsd", "torch", "fp32", 0.0, "loss", 0.5, 1.0)
    columns = [str(column.header) for column in report._parity_table("torch", [check], "fp32 (TF32)").columns]
    assert columns[-1] == "fp32 (TF32)"


def test_the_kernels_hold_on_triton(run: Run) -> None:
    code, outcome, text = run("--backend", "triton", "--quick", "--no-timing", "--only", "divergence", "tile")
    assert code == 0, outcome["failures"]
    assert outcome["backends"] == ["triton"]
    assert {(check["op"], check["group"]) for check in outcome["checks"]} == {
        ("srpo_loss", "divergence"),
        ("srpo_loss", "a divergence by row"),
        ("fused_loss", "divergence"),
        ("token_stats", "divergence"),
        ("token_stats", "engine=tile"),
        ("teacher_stats", "engine=tile"),
    }
    assert outcome["interpreted"] == (not COMPILED)
    assert "parity, backend triton" in text


def test_a_gradient_that_is_slightly_off_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = scaled(torch_rows.dlogits_, lambda: 1.001)
    monkeypatch.setattr(torch_rows, "dlogits_", broken)
    code, outcome, text = run(*TORCH, "--only", "policy loss", "teacher_stats")
    assert code == 1
    assert not outcome["passed"]
    failed = [check for check in outcome["checks"] if not check["passed"]]
    assert {(check["op"], check["dtype"]) for check in failed} == {("srpo_loss", "fp32")}
    assert all(check["tensor"].startswith("grad ") and check["ratio"] > 1 for check in failed)
    assert "srpo_loss, policy loss: loss_type=grpo, torch, fp32: grad" in text
    assert text.strip().splitlines()[-1].startswith("FAIL")


def test_results_that_change_from_run_to_run_fail(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = itertools.count()
    broken = scaled(torch_rows.dlogits_, lambda: 1.0 + 1e-6 * next(runs))
    monkeypatch.setattr(torch_rows, "dlogits_", broken)
    code, outcome, _ = run(*TORCH, "--only", "repeated runs")
    assert code == 1
    assert "between runs" in outcome["failures"][0]
    failed = {check["op"] for check in outcome["checks"] if not check["passed"]}
    assert failed == {"srpo_loss", "token_stats"}


def test_an_exception_is_reported_and_the_run_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_rows = torch_rows.whole_rows

    def broken(logits: Tensor, teacher_logits: Tensor | None, *arguments: Any, **options: Any) -> Any:
        if teacher_logits is not None:
            raise RuntimeError("no such [kernel]")
        return whole_rows(logits, teacher_logits, *arguments, **options)

    monkeypatch.setattr(torch_rows, "whole_rows", broken)
    code, outcome, text = run(*TORCH)
    assert code == 1
    checks = {op: [check for check in outcome["checks"] if check["op"] == op] for op in OPS}
    assert all(check["passed"] for check in checks["teacher_stats"])
    raised = [check for check in checks["token_stats"] if not check["passed"]]
    assert raised
    assert all(check["message"] == "RuntimeError: no such [kernel]" and check["ratio"] is None for check in raised)
    assert "RuntimeError: no such [kernel]" in text


def test_a_nan_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_rows, "dlogits_", scaled(torch_rows.dlogits_, lambda: torch.nan))
    code, outcome, _ = run(*TORCH, "--only", "policy loss")
    assert code == 1
    assert not any(check["passed"] for check in outcome["checks"])


def test_a_step_that_cannot_be_timed_fails_for_the_library_alone(
    run: Run, monkeypatch: pytest.MonkeyPatch, tiny_timing: None
) -> None:
    def out_of_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("too much")

    arguments = ("--device", "cpu", "--backend", "torch", "--quick", "--only", "teacher_stats")
    monkeypatch.setattr(plain, "project_narrow", out_of_memory)
    code, outcome, text = run(*arguments)
    assert code == 0
    assert "OutOfMemoryError: too much" in text
    monkeypatch.setattr(torch_rows, "whole_rows", out_of_memory)
    code, outcome, _ = run(*arguments)
    assert code == 1
    assert any(failure.startswith("timing, policy, torch: OutOfMemoryError") for failure in outcome["failures"])


def test_nothing_checked_is_no_pass(run: Run) -> None:
    code, outcome, text = run(*TORCH, "--only", "no such group")
    assert code == 1
    assert not outcome["passed"]
    assert "nothing was checked" in text


def test_json_goes_to_stdout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TORCH, "--only", "reduction", "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["passed"]
    assert "PASS" in captured.err


@pytest.mark.parametrize("arguments", [("--device", "gpu"), ("--quick", "--full")])
def test_bad_options_are_explained(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit, match=arguments[0]):
        main(arguments)


@pytest.mark.parametrize("package", ["rich", "tyro"])
def test_what_to_install_is_said(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    for name in ("__main__", "report"):
        monkeypatch.delitem(sys.modules, f"srpo_kernels.verify.{name}")
    with pytest.raises(SystemExit, match=r"pip install srpo-kernels\[verify\]"):
        runpy.run_module("srpo_kernels.verify", run_name="__main__")
