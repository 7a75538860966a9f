from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from srpo_kernels.engine import gemm, memory
from tests.mixed_products import ANSWERS, WHERE, Operators


@pytest.fixture(params=list(ANSWERS))
def operators(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Operators]:
    """The CPU as a GPU of some version, in slabs of a few rows."""
    operators = Operators(request.param)
    library = torch.library.Library("aten", "IMPL")
    for name in ("mm", "addmm"):
        for overload in ("dtype", "dtype_out"):
            library.impl(f"{name}.{overload}", getattr(operators, name), "CPU")
    answers = {dtype: gemm._ask.__wrapped__(WHERE, dtype) for dtype in (torch.bfloat16, torch.float16)}
    monkeypatch.setattr(gemm, "mixed_products", lambda device, dtype: answers[dtype])
    monkeypatch.setattr(gemm, "_SLAB_ELEMENTS", 100)
    # Of a larger workspace, the dlogits of several chunks wait for a product.
    monkeypatch.setattr(memory, "_ROWS_ACCELERATOR", 6)
    operators.calls.clear()
    yield operators
    library._destroy()
