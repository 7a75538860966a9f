"""The device that tests of the kernels run on: an accelerator that Triton compiles for, or else the CPU.

Tests make their tensors on the CPU, where the oracle runs. On an accelerator's machine the library's functions get
copies there, and hand back copies on the CPU, in the tests that are about kernels: those with a parameter that is
``"triton"``, and those marked ``kernels``. What is about Triton's interpreter is marked ``interpreter`` and runs in a
process of its own there (``tests/tools/test_interpreter.py``). Tests whose own processes run kernels on the CPU are
marked ``needs_interpreter``.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

CPU = torch.device("cpu")
_CALLS = ("srpo_loss", "fused_loss", "token_stats", "teacher_stats")


def _found() -> torch.device:
    # Whoever asks for the interpreter gets it, beside an accelerator too.
    device = torch.accelerator.current_accelerator(check_available=True)
    usable = device is not None and device.type in ("cuda", "xpu") and os.environ.get("TRITON_INTERPRET") != "1"
    return device if usable else CPU


DEVICE = _found()
COMPILED = DEVICE.type != "cpu"

_current = CPU


@contextmanager
def calls_on(device: torch.device) -> Iterator[None]:
    """The library's functions run on ``device``, once they are ``installed``."""
    global _current
    before, _current = _current, device
    try:
        yield
    finally:
        _current = before


def current() -> torch.device:
    """Where the library's functions run now."""
    return _current


def runs_kernels(item: pytest.Item) -> bool:
    """Whether a test is about them."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    named = any(isinstance(value, str) and value == "triton" for value in parameters)
    return named or item.get_closest_marker("kernels") is not None


def lacks_interpreter() -> str | None:
    """Why Triton's interpreter does not run beside an accelerator; without one the kernels have nothing else."""
    if not COMPILED:
        return None
    import numpy
    import triton

    from srpo_kernels.kernels.launch import check_interpreter

    try:
        check_interpreter(triton.__version__, numpy.__version__)
    except ImportError as reason:
        return str(reason)
    return None


def install() -> None:
    """Put functions that copy in the place of the library's own, in every module that knows them."""
    import srpo_kernels

    for name in _CALLS:
        own = getattr(srpo_kernels, name)
        for module in [x for key, x in sys.modules.items() if key.partition(".")[0] == "srpo_kernels"]:
            if getattr(module, name, None) is own:
                setattr(module, name, copying(own))


def copying(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of copies on the device of ``calls_on``; gradients find their way back to the CPU's leaves."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if _current.type == "cpu" or not any(x.is_cpu for x in given):
            return function(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, lambda x: x.to(_current), (args, kwargs))
        return tree_map_only(Tensor, lambda x: x.to(CPU), function(*args, **kwargs))

    return call


class KernelTests:
    """A plugin that fails a run of all tests on an accelerator in which too few of them launched a compiled kernel."""

    FEWEST = 400

    def __init__(self) -> None:
        self.launches = 0
        self.tests: set[str] = set()
        self._workers: list[str] = []

    def watch(self) -> None:
        """Count launches of compiled kernels."""
        from triton import JITFunction

        run = JITFunction.run

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.launches += 1
            return run(*args, **kwargs)

        JITFunction.run = counted  # type: ignore[method-assign]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        before = self.launches
        yield
        # A test that fails did not run what it is about.
        if self.launches > before:
            self.tests.add(item.nodeid)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """What a worker of pytest-xdist counted."""
        self.tests |= set(getattr(node, "workeroutput", {}).get("kernel_tests", ()))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output["kernel_tests"] = sorted(self.tests)
        elif self.too_few(session.config):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any, config: pytest.Config) -> None:
        terminalreporter.write_line(f"{len(self.tests)} tests launched compiled kernels on {DEVICE}")
        if self.too_few(config):
            terminalreporter.write_line(f"too few: {self.FEWEST} of them are about kernels at the least", red=True)

    def too_few(self, config: pytest.Config) -> bool:
        """Whether it was a run of all tests, or of all that are not slow, and most about kernels ran none."""
        whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword
        return whole and not config.option.collectonly and len(self.tests) < self.FEWEST
