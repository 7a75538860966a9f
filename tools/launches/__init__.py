"""Launches of the kernels that are not the engine's, on paper, for docs/gpu.md.

The engine's launches are static (`srpo_kernels/kernels/launch.py`). Here each is held against what else compiles, by
what the machine code says: instructions, registers and the bytes that are in flight. `verify --tune` measures them.
"""
