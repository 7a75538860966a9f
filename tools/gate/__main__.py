from __future__ import annotations

import tyro

from tools.gate.command import gate

if __name__ == "__main__":
    tyro.cli(gate, prog="python -m tools.gate")
