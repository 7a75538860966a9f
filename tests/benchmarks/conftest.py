from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command of the benchmarks."""

    def call(*arguments: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments)])
        runpy.run_module("benchmarks", run_name="__main__")

    return call
