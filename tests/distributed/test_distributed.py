from __future__ import annotations

import os
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from srpo_kernels import distributed
from srpo_kernels.distributed import gather_numbers
from srpo_kernels.rollout.normalizers import Normalizers
from tests.processes import RankError, needs_gloo, run_ranks

pytestmark = needs_gloo


def normalizers_of(rank: int) -> Normalizers:
    """Rank 0 has distillation rows, rank 1 has none."""
    generator = torch.Generator().manual_seed(rank)
    mask = torch.rand(3, 5, generator=generator) < 0.7
    sdpo_mask = torch.tensor([True, False, True]) & torch.tensor(rank == 0)
    return Normalizers.from_batch(mask, sdpo_mask, torch.rand(3, 5, generator=generator), 1.0)


def reduce_normalizers(rank: int) -> tuple[torch.Tensor | None, ...]:
    mine = normalizers_of(rank)
    with mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as all_gather:
        reduced = mine.all_reduce()
    assert all_gather.call_count == 1

    # One rank does not know a count: all of them learn it, and none waits for another.
    unknown = mine if rank == 0 else mine._replace(sequence_count=None)
    assert unknown.all_reduce().sequence_count is None
    with pytest.raises(ValueError, match="sdpo_count must be known"):
        (mine if rank == 0 else mine._replace(sdpo_count=None)).all_reduce()
    return tuple(reduced)


def test_all_reduce_gives_every_rank_the_normalizers_of_the_whole_batch() -> None:
    first, second = run_ranks(reduce_normalizers, 2)
    merged = normalizers_of(0).merge(normalizers_of(1))
    for here, there, expected in zip(first, second, merged, strict=True):
        assert torch.equal(here, there)
        assert torch.equal(here, expected)
    assert normalizers_of(1).sdpo_count == 0
    assert merged.sdpo_count is not None
    assert merged.sdpo_count > 0


def gather_elsewhere(rank: int) -> list[list[list[int]]]:
    group = dist.group.WORLD
    assert group is not None
    own = torch.zeros(1)
    with torch.device("meta"):
        under_a_default_device = gather_numbers([rank, 7], group, own)
    # A build of torch with CUDA on a machine without a GPU, and a group that does not say what it can.
    with (
        mock.patch.object(dist, "get_backend_config", return_value="other"),
        mock.patch.object(torch.accelerator, "current_accelerator", cuda_without_a_gpu),
    ):
        without_a_gpu = gather_numbers([rank, 7], group, own)
    return [under_a_default_device, without_a_gpu]


def cuda_without_a_gpu(check_available: bool = False) -> torch.device | None:
    return None if check_available else torch.device("cuda")


def test_numbers_are_gathered_where_the_group_can() -> None:
    numbers = [[0, 7], [1, 7]]
    assert run_ranks(gather_elsewhere, 2) == [[numbers, numbers]] * 2


def test_numbers_are_gathered_on_the_device_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    # NCCL has a communicator for each device: the current one, which is 0 without set_device, is another rank's.
    seen = []
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch, "tensor", lambda numbers, device: seen.append(device) or torch.zeros(1, len(numbers)))
    monkeypatch.setattr(distributed, "gather_ranks", lambda values, group: values)
    with FakeTensorMode():
        gpu, host = torch.empty(3, device="cuda:1"), torch.empty(3)
    for like in (gpu, host, "no tensor"):
        distributed.gather_numbers([1, 2], dist.group.WORLD, like)
    assert seen == [torch.device("cuda:1"), torch.device("cuda"), torch.device("cuda")]


def misbehave(rank: int, how: str) -> None:
    if rank == 1 and how == "raise":
        raise ValueError("rank 1 refuses")
    if rank == 1 and how == "die":
        os._exit(3)
    if how == "sleep":
        time.sleep(60)
    dist.all_reduce(torch.ones(1))


def test_a_rank_that_fails_is_reported_with_its_reason() -> None:
    with pytest.raises(RankError, match="rank 1 refuses") as error:
        run_ranks(misbehave, 2, "raise", timeout_seconds=40)
    # Rank 0 waits for a rank that is gone, and says so rather than hang.
    assert set(error.value.tracebacks) == {0, 1}

    with pytest.raises(RankError, match="exit code 3"):
        run_ranks(misbehave, 2, "die", timeout_seconds=40)


def test_ranks_that_never_end_are_ended() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\]"):
        run_ranks(misbehave, 2, "sleep", timeout_seconds=4)
