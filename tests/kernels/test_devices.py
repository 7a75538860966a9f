"""On a GPU's machine the kernels' tests run there, and what is about the interpreter in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from srpo_kernels.kernels import launch
from tests import conftest, devices
from tests.devices import KernelTests, calls_on, copying

ROOT = Path(__file__).parents[2]
# Some that have tests of the kernels, and are collected at once.
FOLDERS = ("engine", "kernels", "rows")
META = torch.device("meta")


def pytest_process(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "PYTEST_XDIST"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=ROOT, env=variables | environment, capture_output=True, text=True, check=False)


def test_a_gpu_s_run_skips_no_test_of_the_kernels() -> None:
    folders = [f"tests/{name}" for name in FOLDERS]
    done = pytest_process("-p", "tests.fake_accelerator", "--collect-only", "-m", "not slow", *folders)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"cuda: (\d+) tests of kernels; skipped: \[\]; in the interpreter: \[\]", done.stdout)
    assert found is not None, done.stdout[-2000:]
    assert int(found[1]) >= 300


@pytest.mark.needs_interpreter
@pytest.mark.skipif(not devices.COMPILED, reason="all tests run in the interpreter here")
def test_what_is_about_the_interpreter() -> None:
    done = pytest_process("-m", "interpreter and not slow", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-5000:]


def item_of(*marks: str, **parameters: Any) -> Any:
    found = {name: getattr(pytest.mark, name).mark for name in marks}
    item = SimpleNamespace(get_closest_marker=found.get, callspec=SimpleNamespace(params=parameters))
    item.add_marker = lambda mark: found.update({mark.name: mark.mark})
    return item


def test_a_test_with_a_parameter_that_is_triton_is_about_kernels() -> None:
    assert devices.runs_kernels(item_of(backend="triton"))
    assert devices.runs_kernels(item_of(implementation="triton", size=torch.ones(2)))
    assert devices.runs_kernels(item_of("kernels"))
    assert not devices.runs_kernels(item_of(backend="torch", options={"backend": "triton"}))


@pytest.mark.parametrize(
    ("compiled", "numpy", "skipped"), [(True, "2.5.2", 1), (True, "2.3.5", 0), (False, "2.5.2", 0)]
)
def test_only_beside_an_accelerator_may_the_interpreter_be_missing(
    compiled: bool, numpy: str, skipped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "COMPILED", compiled)
    monkeypatch.setattr(launch.triton, "__version__", "3.6.0")
    monkeypatch.setattr("numpy.__version__", numpy)
    items = [item_of("needs_interpreter"), item_of()]
    config: Any = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: None))
    conftest.pytest_collection_modifyitems(config, items)
    skips = [mark.kwargs["reason"] for item in items if (mark := item.get_closest_marker("skip"))]
    assert len(skips) == skipped
    assert all("numpy 2.5.2" in reason for reason in skips)


class Found(NamedTuple):
    where: str
    value: Tensor | None


def test_a_call_gets_copies_where_kernels_run() -> None:
    def call(x: Tensor, *, inputs: dict[str, Any]) -> Found:
        assert inputs["none"] is None
        assert x.device == inputs["own"][0].device
        return Found(x.device.type, torch.ones(2) if x.is_meta else x)

    copied, x = copying(call), torch.zeros(2, requires_grad=True)
    inputs = {"own": [torch.zeros(3)], "none": None}
    assert copied(x, inputs=inputs).value is x
    with calls_on(META):
        found = copied(x, inputs=inputs)
        # What is there already comes back from there.
        assert copied(x.to(META), inputs={"own": [torch.zeros(3, device=META)], "none": None}).where == "meta"
    assert found.where == "meta"
    assert found.value is not None and found.value.is_cpu


def config_of(source: pytest.Config.ArgsSource, keyword: str = "", collectonly: bool = False) -> Any:
    return SimpleNamespace(args_source=source, option=SimpleNamespace(keyword=keyword, collectonly=collectonly))


def test_a_run_on_a_gpu_in_which_kernels_were_not_launched_fails() -> None:
    tests, sources = KernelTests(), pytest.Config.ArgsSource
    session = SimpleNamespace(config=config_of(sources.TESTPATHS), exitstatus=0)
    tests.pytest_sessionfinish(session)
    assert session.exitstatus == pytest.ExitCode.TESTS_FAILED
    for some in (config_of(sources.ARGS), config_of(sources.TESTPATHS, "tile"), config_of(sources.TESTPATHS, "", True)):
        assert not tests.too_few(some)
    # Of two workers.
    half = KernelTests.FEWEST // 2
    for part in (range(half), range(half, KernelTests.FEWEST)):
        tests.pytest_testnodedown(SimpleNamespace(workeroutput={"kernel_tests": list(map(str, part))}), None)
    assert not tests.too_few(session.config)


def test_a_test_that_launches_a_kernel_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import JITFunction

    monkeypatch.setattr(JITFunction, "run", lambda *args, **options: "launched")
    tests, item = KernelTests(), SimpleNamespace(nodeid="a test")
    tests.watch()
    for launches in (False, True):
        called = tests.pytest_runtest_call(item)
        next(called)
        if launches:
            assert JITFunction.run(None) == "launched"
        next(called, None)
        assert tests.tests == ({"a test"} if launches else set())
