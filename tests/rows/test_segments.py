"""Sums of segments: the two ways to the same numbers, and which one a GPU gets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from srpo_kernels import group_advantages
from srpo_kernels.engine.gemm import HeadGradient
from srpo_kernels.losses.sequences import Sequences
from srpo_kernels.rows.segments import add_rows_, segment_sums, sums_in_order


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func.overloadpacket.__name__).rstrip("_"))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's operators by the way that a GPU takes."""
    monkeypatch.setattr("srpo_kernels.rows.segments.sums_in_order", lambda device: False)


def sums(values: Tensor, ids: Tensor) -> list[Tensor]:
    values = values.clone().requires_grad_()
    found = segment_sums(values, ids, 4)
    (gradient,) = torch.autograd.grad(found.square().sum(), values)
    total = torch.ones(4, 3, dtype=values.dtype)
    add_rows_(total, ids, values.detach()[0][:, None].expand(-1, 3))
    return [found.detach(), gradient, total]


IDS = torch.tensor([2, 0, 2, 3, 0, 2])


def test_the_sums_of_segments() -> None:
    values = torch.arange(12.0, dtype=torch.float64).view(2, 6)
    found, gradient, total = sums(values, IDS)
    assert found.tolist() == [[5.0, 0.0, 7.0, 3.0], [17.0, 0.0, 25.0, 9.0]]
    assert torch.equal(gradient, 2 * found[:, IDS])
    assert torch.equal(total, 1 + found[0][:, None].expand(-1, 3))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_gpu_s_way_gives_the_same() -> None:
    test_the_sums_of_segments()


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_gpu_adds_nothing_in_an_order_of_its_own() -> None:
    values = torch.rand(6, requires_grad=True)
    with Operators() as operators:
        Sequences(IDS, 4).mean(values).square().sum().backward()
        head = HeadGradient(torch.rand(9, 2), torch.rand(9), torch.float32)
        head.add_rows(IDS[:, None], torch.rand(6, 1), torch.rand(6, 2))
        group_advantages(torch.rand(6), IDS, "group")
    assert "index_put" in operators.names
    # From PyTorch's list of operators that are not deterministic on CUDA.
    assert not operators.names & {"index_add", "scatter_add", "bincount", "histc"}


def test_only_a_cpu_adds_row_after_row() -> None:
    assert [name for name in ("cpu", "cuda", "xpu", "mps") if sums_in_order(torch.device(name))] == ["cpu"]


@pytest.mark.parametrize("scale", ["none", "group"])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_advantages_by_a_gpu_s_way(scale: Any) -> None:
    rewards, groups = torch.tensor([1.0, 0.0, 0.25, 3.0, 3.0]), torch.tensor([7, 7, 7, 1, 1])
    actual = group_advantages(rewards, groups, scale)
    mean = rewards[:3].mean()
    divisor = 1.0 if scale == "none" else rewards[:3].std() + 1e-4
    torch.testing.assert_close(actual, torch.cat([(rewards[:3] - mean) / divisor, torch.zeros(2)]))
