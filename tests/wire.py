"""What a call sends to other ranks."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist


class Wire:
    """Counts the collectives that a call uses, and the bytes that this rank puts into them."""

    def __enter__(self) -> Wire:
        self.gathered: list[int] = []
        self.reduced: list[int] = []
        all_gather, all_reduce = dist.all_gather, dist.all_reduce

        def gather(out: list[torch.Tensor], x: torch.Tensor, **kwargs: Any) -> None:
            self.gathered.append(x.nbytes)
            all_gather(out, x, **kwargs)

        def reduce(x: torch.Tensor, **kwargs: Any) -> None:
            self.reduced.append(x.nbytes)
            all_reduce(x, **kwargs)

        self.patch = mock.patch.multiple(dist, all_gather=gather, all_reduce=reduce)
        self.patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.stop()
