"""The likeliest tokens of rows that are padded: the same ids, from copies of a few rows."""

from __future__ import annotations

import pytest
import torch

from srpo_kernels.rows import passes


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_they_are_those_of_the_whole(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    padded = torch.randn(rows, 48)[:, :33]
    monkeypatch.setattr(passes, "_COPIED_ELEMENTS", 70)
    assert torch.equal(passes._likeliest(padded, 3), padded.topk(3, dim=1).indices)


def test_rows_are_handed_over_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "_COPIED_ELEMENTS", 70)
    heights = []
    topk = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda x, k, dim: heights.append(len(x)) or topk(x, k, dim))
    for width in (48, 33):
        passes._likeliest(torch.randn(7, width)[:, :33], 3)
    # Of contiguous rows all at once.
    assert heights == [2, 2, 2, 1, 7]
