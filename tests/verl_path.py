"""Where verl is: installed as any package, or in a folder of the environment (see the Makefile)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

# A folder, since the wheel of verl also brings top-level packages `tests` and `scripts`, and pins transformers.
FOLDER = Path(sys.prefix) / "verl"
STUBS = Path(__file__).parent / "stubs"

INSTALLED = importlib.util.find_spec("verl") is not None or (FOLDER / "verl").is_dir()
# What must be on the path for `import verl`.
PATHS = [str(FOLDER)] if importlib.util.find_spec("verl") is None else []
PATHS += [str(STUBS)] if importlib.util.find_spec("ray") is None else []
