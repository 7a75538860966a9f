"""``pytest -p tests.fake_accelerator --collect-only``: what a GPU's machine would run, and what it would skip."""

from __future__ import annotations

import pytest
import torch

from tests import devices

FAKE = torch.device("cuda")

torch.accelerator.is_available = lambda: True
torch.accelerator.current_accelerator = lambda check_available=False: FAKE
devices.DEVICE, devices.COMPILED = devices._found(), True


def pytest_collection_finish(session: pytest.Session) -> None:
    kernels = [item for item in session.items if devices.runs_kernels(item)]
    skipped = [item.nodeid for item in kernels if any(map(_holds, item.iter_markers()))]
    interpreted = [item.nodeid for item in session.items if item.get_closest_marker("interpreter")]
    print(f"{devices.DEVICE}: {len(kernels)} tests of kernels; skipped: {skipped}; in the interpreter: {interpreted}")


def _holds(mark: pytest.Mark) -> bool:
    return mark.name == "skip" or (mark.name == "skipif" and bool(mark.args[0]))
