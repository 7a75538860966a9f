from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# Before transformers is imported: tests never ask a network for a model.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before triton is imported: without a GPU its kernels run in the interpreter. Compilers get a process of their own.
if not torch.accelerator.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from tools.interpreter import rounding
from tools.interpreter.launches import interpreting

if interpreting():
    rounding.install()

# `pytest --hypothesis-profile=deep` searches longer.
settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("deep", max_examples=500, deadline=None)
settings.load_profile("ci")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same torch seed."""
    torch.manual_seed(0)
