"""``python -m srpo_kernels.verify --report``: sections that fail, die or wait for the next run, and what is written."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="a command prints with rich: the extras verify and bench have it")
pytest.importorskip("tyro", reason="a command reads its options with tyro: the extras verify and bench have it")

from srpo_kernels.verify import rounds
from srpo_kernels.verify.__main__ import main
from srpo_kernels.verify.batches import Case
from srpo_kernels.verify.device_report import command, compiled, render, sections, steps
from srpo_kernels.verify.device_report.command import Job, write_report
from srpo_kernels.verify.device_report.record import Record
from srpo_kernels.verify.device_report.sections import Section
from srpo_kernels.verify.device_report.sizes import Sizes
from srpo_kernels.verify.providers.fused import loss as library_loss

Plant = Callable[..., list[str]]


class Inline:
    """A process that is this one, and what it ended with."""

    def __init__(self, target: Callable[..., None], args: tuple[Any, ...]) -> None:
        self._run, self.exitcode = lambda: target(*args), 0

    def start(self) -> None:
        try:
            self._run()
        except SystemExit as end:
            assert isinstance(end.code, int)
            self.exitcode = end.code

    def join(self, timeout: float | None = None) -> None: ...

    def kill(self) -> None: ...

    def is_alive(self) -> bool:
        return False


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(Process=Inline)
    monkeypatch.setattr(command.multiprocessing, "get_context", lambda method: context)


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch, inline: None) -> Plant:
    """Sections in the place of all others; the names of those that ran."""

    def put(**runs: Callable[[], Any]) -> list[str]:
        ran: list[str] = []

        def section(name: str) -> Section:
            return Section(name, lambda: ran.append(name) or runs[name]())

        monkeypatch.setattr(command, "sections", lambda machine, size: [section(name) for name in runs])
        return ran

    return put


def job(folder: Path, seconds: float = 60.0) -> Job:
    return Job(folder, "cpu", "torch", "small", time.time() + seconds)


def content(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def raising() -> None:
    raise RuntimeError("no such [kernel]")


def test_a_section_that_fails_loses_none_of_the_others(plant: Plant, tmp_path: Path) -> None:
    ran = plant(a=raising, b=lambda: {"number": math.nan})
    assert write_report(job(tmp_path / "new")) == 1
    assert ran == ["a", "b"]
    found = content(tmp_path / "new")["sections"]
    assert found["a"] == {"state": "failed", "message": "RuntimeError: no such [kernel]"}
    assert found["b"]["result"] == {"number": None}
    assert "**failed** a: RuntimeError: no such [kernel]" in (tmp_path / "new" / "report.md").read_text()
    # What is there is not run again, but for what failed where that is asked for.
    assert write_report(job(tmp_path / "new")) == 1
    assert ran == ["a", "b"]
    assert write_report(job(tmp_path / "new"), retry=True) == 1
    assert ran == ["a", "b", "a"]


def test_a_device_that_is_lost_is_left_for_a_new_process(
    plant: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = plant(a=raising, b=lambda: sys.exit(139), c=lambda: 1)
    monkeypatch.setattr(command, "_works", lambda device: False)
    starts: list[object] = []
    monkeypatch.setattr(Inline, "start", lambda self, start=Inline.start: (starts.append(self), start(self)))
    assert write_report(job(tmp_path)) == 1
    assert ran == ["a", "b", "c"]
    assert len(starts) == 3
    found = content(tmp_path)["sections"]
    assert [found[name]["state"] for name in ran] == ["failed", "failed", "done"]
    assert found["b"]["message"] == "its process ended with exit code 139"


def test_what_there_was_no_time_for_is_named_and_done_later(plant: Plant, tmp_path: Path) -> None:
    ran = plant(a=lambda: 1, b=lambda: 2)
    assert write_report(job(tmp_path, seconds=-1.0)) == 0
    assert ran == []
    assert content(tmp_path)["missing"] == ["a", "b"]
    assert "missing: a, b" in (tmp_path / "report.md").read_text()
    write_report(job(tmp_path))
    assert ran == ["a", "b"]
    assert content(tmp_path)["missing"] == []


def test_a_section_that_hangs_is_ended(plant: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(a=lambda: sys.exit(0), b=lambda: 2)
    monkeypatch.setattr(Inline, "is_alive", lambda self: True)
    assert write_report(job(tmp_path)) == 1
    assert content(tmp_path)["sections"]["a"]["message"] == "it was not done when the time was over"


def test_a_process_that_never_begins_is_no_endless_loop(
    plant: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(a=lambda: 1)
    monkeypatch.setattr(command, "work", lambda job: sys.exit(1))
    with pytest.raises(SystemExit, match="exit code 1 before any"):
        write_report(job(tmp_path))


def test_another_devices_folder_is_refused(plant: Plant, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(a=lambda: 1)
    record = Record(tmp_path)
    record.identify({"device": "another"})
    record.begin("a")
    assert write_report(job(tmp_path)) == command._REFUSED
    assert "give another folder" in capsys.readouterr().err
    assert content(tmp_path)["identity"] == {"device": "another"}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = Sizes((Case("tiny", "routed", 128),), ((96, 16),), (8,), 8, 1 << 16)
    monkeypatch.setattr(sections, "sizes", lambda name, dtypes: chosen)
    few = ("bare", "srpo_kernels", "srpo_kernels-triton", "naive", "linear_cross_entropy")
    monkeypatch.setattr(steps, "PROVIDERS", few)
    monkeypatch.setattr(steps, "_ROUNDS", rounds.Rounds(2, 1.0))
    quick = sections.parity_tasks
    monkeypatch.setattr(sections, "parity_tasks", lambda machine, **options: quick(machine, **options)[::40])
    monkeypatch.setattr(sections, "determinism_tasks", lambda machine: [])


def test_everything_is_in_the_report(tiny: None, inline: None, tmp_path: Path) -> None:
    assert main(["--report", str(tmp_path), "--device", "cpu", "--backend", "torch", "--sizes", "small"]) == 0
    found, text = content(tmp_path), (tmp_path / "report.md").read_text()
    assert found["missing"] == []
    step = found["sections"]["step: tiny, routed, float32, 53% active"]["result"]
    providers = step["providers"]
    assert all(providers[name]["seconds"]["median"] > 0 for name in ("bare", "srpo_kernels", "naive"))
    assert providers["srpo_kernels"]["errors"]["grad_weight"] < 1e-4
    assert providers["srpo_kernels-triton"] == {"reason": "needs a GPU"}
    assert step["seconds_at_peak"] is None
    for title in ("Environment", "Products", "Parity", "Row passes", "Steps"):
        assert f"## {title}" in text
    assert "Small sizes" in text
    assert "- **failed** nothing" in text


def test_a_fault_of_the_library_is_a_failure_and_a_peers_is_none(
    tiny: None, inline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(batch: Any, backend: str = "torch") -> Any:
        loss, log_probs = library_loss(batch, backend)
        return 3 * loss, log_probs

    monkeypatch.setattr("srpo_kernels.verify.providers.fused.loss", broken)
    monkeypatch.setattr("srpo_kernels.verify.providers.torch_cross_entropy.prepare", lambda batch: raising())
    only = [Section("step", lambda: steps.measure_step(Case("tiny", "policy", 32), torch.device("cpu"), "a CPU"))]
    monkeypatch.setattr(command, "sections", lambda machine, size: only)
    assert write_report(job(tmp_path)) == 1
    (line,) = render.failures(content(tmp_path))
    assert line.startswith("step: srpo_kernels: RuntimeError: srpo_kernels does not compute the same")
    assert "`linear_cross_entropy`: RuntimeError: no such [kernel]" in (tmp_path / "report.md").read_text()


def test_checks_that_fail_are_listed() -> None:
    check = {"op": "srpo_loss", "group": "clips", "case": "delta=1.1", "backend": "triton", "dtype": "bf16"}
    check |= {"message": None, "tensor": "loss", "error": None, "allowed": 0.1}
    group = {"kind": "parity", "backend": "triton", "dtype": "bf16", "op": "srpo_loss", "group": "clips"}
    group |= {"checks": 7, "worst": None, "failed": [check]}
    found = {
        "identity": {"device": "NVIDIA H100 80GB HBM3", "sizes": "gpu"},
        "sections": {"parity: bf16": {"state": "done", "seconds": 1.0, "result": [group]}},
        "missing": [],
        "kernels": {},
    }
    assert "Small sizes" not in render.markdown(found)
    assert "| triton | srpo_loss | 7: **1 failed** |" in render.markdown(found)
    (line,) = render.failures(found)
    assert line == "parity: bf16: srpo_loss, clips: delta=1.1, triton, bf16: loss is off by None, allowed 0.1"


def test_options_without_a_report_are_refused(tmp_path: Path) -> None:
    for alone in (("--minutes", "3"), ("--sizes", "small"), ("--retry",)):
        with pytest.raises(SystemExit, match="options of --report"):
            main(alone)
    with pytest.raises(SystemExit, match="leave out"):
        main(["--report", str(tmp_path), "--quick"])


def test_kernels_that_were_compiled_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = SimpleNamespace(num_warps=8, shared=1024)
    kernel = SimpleNamespace(hash="abc", metadata=metadata, n_regs=64, n_spills=0)
    launched = SimpleNamespace(device_caches={0: ({"key": kernel}, None)})
    monkeypatch.setattr("srpo_kernels.kernels.row_stats.row_stats_kernel", launched)
    # Other tests may have compiled the others.
    monkeypatch.setattr(compiled, "_MODULES", ("row_stats",))
    here = SimpleNamespace(backends=("torch", "triton"), interpreted=True, device=torch.device("cuda"))
    assert compiled.compiled_kernels(here) == []
    here.interpreted = False
    limits = {"warp_size": 32, "max_threads_per_multi_processor": 2048, "regs_per_multiprocessor": 65_536}
    properties = SimpleNamespace(**limits, shared_memory_per_multiprocessor=233_472)
    module = SimpleNamespace(get_device_properties=lambda device: properties)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    (found,) = compiled.compiled_kernels(here)
    # Registers are what there are for four programs.
    assert (found["kernel"], found["registers"], found["warps_per_multiprocessor"]) == ("row_stats", 64, 32)
    del properties.warp_size
    assert compiled.compiled_kernels(here)[0]["warps_per_multiprocessor"] is None
    assert "| row_stats | 1 | 64 | 0 | 1,024 | 8 | 32 |" in render._kernels([found])


def test_a_device_that_is_not_there_is_said(inline: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--report", str(tmp_path), "--device", "gpu"]) == command._REFUSED
    assert "gpu" in capsys.readouterr().err


def test_kernels_that_cannot_be_asked_lose_nothing(
    plant: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(a=lambda: 1, b=lambda: 2)
    monkeypatch.setattr(command, "compiled_kernels", lambda machine: raising())
    assert write_report(job(tmp_path)) == 1
    found = content(tmp_path)["sections"]
    assert {name: x["state"] for name, x in found.items()} == {"a": "done", "kernels": "failed", "b": "done"}


@pytest.mark.slow
def test_a_process_of_its_own_runs_the_sections(tmp_path: Path) -> None:
    assert main(["--report", str(tmp_path), "--device", "cpu", "--minutes", "0"]) == 0
    missing = content(tmp_path)["missing"]
    assert missing[0] == "environment"
    assert "step: smollm2-135m, policy, float32" in missing
