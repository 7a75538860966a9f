"""``python -m tests.fuzz --backend torch --cases 3000 --seed 0``."""

from __future__ import annotations

import sys

import tests.conftest  # noqa: F401  (the interpreter, and what it needs)
from tests.fuzz.run import main

if __name__ == "__main__":
    sys.exit(main())
