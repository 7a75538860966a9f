"""What an `SRPOEngine` refuses when it is built, by the option's name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("verl.workers.engine", reason="the engine needs verl with all it wants: `make test-verl` does it")

from srpo_kernels.integrations.verl.checks import refuse_options, temperature_of


def refuse(fused: bool = False, mtp: bool = False, qat: bool = False, ulysses: int = 1, **model: Any) -> None:
    refuse_options(
        SimpleNamespace(use_fused_kernels=fused, mtp=SimpleNamespace(enable=mtp), hf_config=SimpleNamespace(**model)),
        SimpleNamespace(qat=SimpleNamespace(enable=qat), ulysses_sequence_parallel_size=ulysses),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fused": True}, r"model\.use_fused_kernels must be false"),
        ({"mtp": True}, r"model\.mtp\.enable must be false"),
        ({"qat": True}, r"fsdp_config\.qat\.enable must be false"),
        ({"ulysses": 2, "vision_config": {}}, r"fsdp_config\.ulysses_sequence_parallel_size must be 1 .*, got 2"),
    ],
)
def test_options_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refuse(**changes)


def test_others_are_not() -> None:
    refuse(ulysses=2)
    refuse(vision_config={})


def test_a_temperature_is_one_number() -> None:
    assert temperature_of(0.7) == 0.7
    assert temperature_of(torch.tensor([0.5, 0.5])) == 0.5
    for values in ([0.5, 1.0], []):
        with pytest.raises(ValueError, match="temperature must be one number for all sequences"):
            temperature_of(torch.tensor(values))
