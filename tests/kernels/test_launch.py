"""What Triton is told at a launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.interpreter import GridExecutor

from srpo_kernels import srpo_loss, token_stats
from srpo_kernels.kernels import launch
from tests.comparison import with_leaves
from tests.inputs import for_backend, head_inputs, loss_inputs

pytestmark = pytest.mark.interpreter


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_launch_asks_for_multiply_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    run = GridExecutor.__call__

    def record(self: Any, *args: Any, **options: Any) -> Any:
        seen[self.fn.__name__] = options.get("enable_fp_fusion")
        return run(self, *args, **options)

    monkeypatch.setattr(GridExecutor, "__call__", record)
    inputs = with_leaves(for_backend(loss_inputs(), "triton"))
    srpo_loss(**inputs, backend="triton").loss.backward()
    with torch.no_grad():
        inputs = for_backend(head_inputs(0, (2, 3), 8, 33), "triton")
        token_stats(**inputs, divergence="reverse_kl", backend="triton", engine="tile")
    names = ("row_stats", "row_mixture", "row_grad", "tile_stats", "merge_tiles")
    assert seen == {f"{name}_kernel": True for name in names}


def test_amd_s_kinds_have_the_threads_that_they_ask_for() -> None:
    for vendor, warp in (("nvidia", 32), ("cdna", 64), ("rdna", 32)):
        for models in (1, 2):
            assert launch.row_launch(models, vendor).num_warps * warp == 256
        assert launch.merge_launch(vendor).num_warps * warp == 256
