from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from srpo_kernels.types import Normalizers

WORLD_SIZE = 2

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this build of torch has no gloo backend"
)


def normalizers_of(rank: int) -> Normalizers:
    """Rank 0 has distillation rows, rank 1 has none."""
    generator = torch.Generator().manual_seed(rank)
    mask = torch.rand(3, 5, generator=generator) < 0.7
    sdpo_mask = torch.tensor([True, False, True]) & torch.tensor(rank == 0)
    return Normalizers.from_batch(mask, sdpo_mask, torch.rand(3, 5, generator=generator), 1.0)


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=60),
    )
    mine = normalizers_of(rank)
    with mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as all_gather:
        reduced = mine.all_reduce()
    assert all_gather.call_count == 1

    # One rank does not know a count: all of them learn it, and none waits for another.
    unknown = mine if rank == 0 else mine._replace(sequence_count=None)
    assert unknown.all_reduce().sequence_count is None
    with pytest.raises(ValueError, match="sdpo_count must be known"):
        (mine if rank == 0 else mine._replace(sdpo_count=None)).all_reduce()

    torch.save(tuple(reduced), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_all_reduce_gives_every_rank_the_normalizers_of_the_whole_batch(tmp_path: Path) -> None:
    mp.spawn(work, args=(tmp_path,), nprocs=WORLD_SIZE)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD_SIZE))
    merged = normalizers_of(0).merge(normalizers_of(1))
    for here, there, expected in zip(first, second, merged, strict=True):
        assert torch.equal(here, there)
        assert torch.equal(here, expected)
    assert normalizers_of(1).sdpo_count == 0
    assert merged.sdpo_count is not None
    assert merged.sdpo_count > 0
