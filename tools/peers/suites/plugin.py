"""The pytest plugin that runs a peer's tests with this library in the place of its functions.

Every test has one of three outcomes: it passed and reached this library, it has no counterpart, or it failed.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Generator
from typing import Any

import pytest

import srpo_kernels as sk
from tools.peers.suites import machine
from tools.peers.suites.suite import NO_COUNTERPART, Suite

# The calls that a test may reach.
_OURS = ("token_stats", "teacher_stats", "fused_loss", "srpo_loss", "policy_loss", "group_advantages")


class Runner:
    """The hooks of one run."""

    def __init__(self, suite: Suite, smallest: bool, report: str, every: int) -> None:
        self.suite, self.smallest, self.report, self.every = suite, smallest, report, every
        self.outcomes: list[dict[str, str]] = []
        # Shared with the processes that a test starts.
        self.calls = multiprocessing.Value("q", 0)
        for name in _OURS:
            setattr(sk, name, self._counted(getattr(sk, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            with self.calls.get_lock():
                self.calls.value += 1
            return function(*args, **keywords)

        return call

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Smaller parameters, the marks of those without a counterpart, and of the others one in so many."""
        replace(self.suite.stand_ins)
        own = [x for x in items if not any(re.search(pattern, x.nodeid) for pattern, _ in self.suite.without)]
        left_out = {id(item) for i, item in enumerate(own) if i % self.every}
        items[:] = [item for item in items if id(item) not in left_out]
        for item in items:
            callspec = getattr(item, "callspec", None)
            if callspec is not None:
                callspec.params.update(self.suite.shrink(callspec.params, self.smallest, item.nodeid))
            for pattern, reason in self.suite.without:
                if re.search(pattern, item.nodeid):
                    item.add_marker(pytest.mark.skip(reason=NO_COUNTERPART + reason))
                    break

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, None, None]:
        """Count what this test reaches."""
        self.calls.value = 0
        yield

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported has failed; one that skips itself too."""
        if report.outcome != "passed":
            self._note(report.nodeid, "failed", _last_line(report))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The outcome, from the call or from what ended the test before it."""
        if report.when == "call" or report.outcome != "passed":
            self._note(report.nodeid, *self._outcome(report))

    def _outcome(self, report: pytest.TestReport) -> tuple[str, str]:
        if report.outcome == "passed":
            reached = self.calls.value or not self.suite.reaches
            return ("passed", "") if reached else ("no counterpart", "computes none of our functions")
        said = _last_line(report).removeprefix("Skipped: ")
        if report.outcome == "skipped" and said.startswith(NO_COUNTERPART):
            return "no counterpart", said.removeprefix(NO_COUNTERPART)
        return ("no counterpart", f"skipped by the test: {said}") if report.outcome == "skipped" else ("failed", said)

    def _note(self, test: str, outcome: str, reason: str) -> None:
        self.outcomes.append({"test": test, "outcome": outcome, "reason": reason})

    def pytest_sessionfinish(self) -> None:
        """Write the outcomes."""
        with open(self.report, "w") as file:
            json.dump(self.outcomes, file)


def _last_line(report: pytest.CollectReport | pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(report.longrepr) if crash is None else str(crash.message)
    return text.strip().splitlines()[-1 if crash is None else 0][:200] if text.strip() else ""


def replace(stand_ins: Any) -> None:
    """Put ours into every loaded module that has theirs."""
    ours: dict[int, tuple[object, object]] = {}
    for path, stand_in in stand_ins.items():
        module, _, name = path.partition(":")
        owner: Any = importlib.import_module(module)
        *classes, name = name.split(".")
        for inner in classes:
            owner = getattr(owner, inner)
        theirs = getattr(owner, name)
        setattr(owner, name, stand_in)
        # The object is kept, so that its id is not another's.
        ours[id(theirs)] = (theirs, stand_in)
    for module in list(sys.modules.values()):
        for name, value in list(vars(module).items()) if hasattr(module, "__dict__") else ():
            if id(value) in ours and value is not ours[id(value)][1]:
                setattr(module, name, ours[id(value)][1])


def pytest_configure(config: pytest.Config) -> None:
    """Prepare the machine, import theirs, and put ours in their place."""
    peer, report = os.environ["SRPO_PEER"], os.environ["SRPO_PEER_REPORT"]
    suite: Suite = importlib.import_module(f"tools.peers.suites.{peer}").SUITE
    machine.fake(suite.absent)
    if suite.asks_for_cuda:
        machine.pretend_cuda()
    suite.prepare()
    runner = Runner(suite, os.environ["SRPO_PEER_BACKEND"] == "triton", report, int(os.environ["SRPO_PEER_EVERY"]))
    replace(suite.stand_ins)
    config.pluginmanager.register(runner, "srpo_peers")
