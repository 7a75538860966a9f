"""What is measured: a GPU's cases, and small ones to try the report on any machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from srpo_kernels.verify.batches import Case
from srpo_kernels.verify.kinds import DtypeName, HeadName, Workload

SizesName = Literal["gpu", "small"]

_WORKLOADS: tuple[Workload, ...] = ("policy", "jsd", "routed")


@dataclass(frozen=True)
class Sizes:
    """Cases of whole steps in their order, the most telling first; and of matmuls, copies and row passes.

    ``chunks`` are numbers of rows that a product may have, ``pass_rows`` those of a pass; ``heads`` are ``[V, H]``.
    """

    steps: tuple[Case, ...]
    heads: tuple[tuple[int, int], ...]
    chunks: tuple[int, ...]
    pass_rows: int
    copied_bytes: int


def sizes(name: SizesName, dtypes: tuple[torch.dtype, ...]) -> Sizes:
    """In bf16 where the device has it."""
    if name == "small":
        return _sizes((("smollm2-135m", 64),), ((4_096, 64),), (64,), 64, 1 << 24, "float32")
    dtype: DtypeName = "bfloat16" if torch.bfloat16 in dtypes else "float32"
    heads: tuple[tuple[HeadName, int], ...] = (
        ("qwen3-8b", 8_192),
        ("llama-3-8b", 8_192),
        ("qwen3-0.6b", 8_192),
        ("gemma-3-1b", 8_192),
    )
    shapes = ((151_936, 4_096), (128_256, 4_096), (151_936, 1_024), (262_144, 1_152))
    return _sizes(heads, shapes, (1_024, 4_096), 1_024, 1 << 30, dtype)


def _sizes(
    heads: tuple[tuple[HeadName, int], ...],
    shapes: tuple[tuple[int, int], ...],
    chunks: tuple[int, ...],
    pass_rows: int,
    copied_bytes: int,
    dtype: DtypeName,
) -> Sizes:
    steps = tuple(Case(head, workload, rows, dtype) for head, rows in heads for workload in _WORKLOADS)
    return Sizes(steps, shapes, chunks, pass_rows, copied_bytes)
