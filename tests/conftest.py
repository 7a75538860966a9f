from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# Before transformers is imported: tests never ask a network for a model.
os.environ["HF_HUB_OFFLINE"] = "1"

from tests import devices

# Before triton is imported: without a GPU its kernels run in the interpreter. Compilers get a process of their own.
if not devices.COMPILED:
    os.environ["TRITON_INTERPRET"] = "1"

from tools.interpreter import rounding, shortcuts
from tools.interpreter.launches import interpreting

if interpreting():
    rounding.install()
    shortcuts.install()
if devices.COMPILED:
    devices.install()

# `pytest --hypothesis-profile=deep` searches longer.
settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("deep", max_examples=500, deadline=None)
settings.load_profile("ci")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same torch seed."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where the library's functions run."""
    where = devices.DEVICE if devices.runs_kernels(request.node) else devices.CPU
    with devices.calls_on(where):
        yield where


def pytest_configure(config: pytest.Config) -> None:
    if devices.COMPILED:
        watcher = devices.KernelTests()
        watcher.watch()
        config.pluginmanager.register(watcher, "kernel tests")


def pytest_collection_finish() -> None:
    """What is imported stays: trainers collect garbage at every turn, half a second each with all of it."""
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where kernels are compiled, what is about the interpreter is left to a process of its own, if it runs there."""
    if not devices.COMPILED:
        return
    if reason := devices.lacks_interpreter():
        for item in items:
            if item.get_closest_marker("needs_interpreter"):
                item.add_marker(pytest.mark.skip(reason=reason))
    apart = [item for item in items if item.get_closest_marker("interpreter")]
    config.hook.pytest_deselected(items=apart)
    items[:] = [item for item in items if item not in apart]
