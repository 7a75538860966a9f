"""Where verl is: installed as any package, or in a folder of the environment (see the Makefile)."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# A folder, since the wheel of verl also brings top-level packages `tests` and `scripts`, and pins transformers.
FOLDER = Path(sys.prefix) / "verl"
STUBS = Path(__file__).parent / "stubs"

INSTALLED = importlib.util.find_spec("verl") is not None or (FOLDER / "verl").is_dir()
# What must be on the path for `import verl`.
PATHS = [str(FOLDER)] if importlib.util.find_spec("verl") is None else []
PATHS += [str(STUBS)] if importlib.util.find_spec("ray") is None else []


@contextmanager
def importable() -> Iterator[None]:
    """`import verl` works, and registers no plugin by itself; what stands in for ray is gone afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for path in PATHS:
            patch.syspath_prepend(path)
        patch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
        yield
    if "ray" in sys.modules and not hasattr(sys.modules["ray"], "__path__"):
        del sys.modules["ray"]
