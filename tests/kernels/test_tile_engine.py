"""``engine="tile"`` of ``token_stats`` and ``teacher_stats``: the oracle's numbers without a logit in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import reference
from srpo_kernels import SRPOConfig, teacher_stats, token_stats
from srpo_kernels.rows.mixture import MIXTURE_DIVERGENCES
from tests.comparison import assert_as_accurate, with_leaves
from tests.devices import DEVICE
from tests.inputs import Inputs, cast, head_inputs
from tests.meters import MemoryMeter

VOCAB_SIZE = 1009


def inputs_of(dtype: torch.dtype, teacher_size: int | None = 24) -> Inputs:
    inputs = head_inputs(0, (5, 7), 40, VOCAB_SIZE, teacher_size, spread=2.0)
    return {name: x if x is None else x.to(DEVICE) for name, x in cast(inputs, dtype).items()}


def tiled(inputs: Inputs, **options: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        out = token_stats(**inputs, backend="triton", engine="tile", **options)
    return {name: x for name, x in out._asdict().items() if x is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("teacher_size", [None, 24], ids=["shared head", "own head"])
def test_parity(divergence: str, softcap: float | None, dtype: torch.dtype, teacher_size: int | None) -> None:
    inputs, options = inputs_of(dtype, teacher_size), {"divergence": divergence, "softcap": softcap, "temperature": 0.7}
    exact, naive = (
        {k: v for k, v in reference.token_stats(**x, **options)._asdict().items() if v is not None}
        for x in (cast(inputs, torch.float64), inputs)
    )
    assert_as_accurate(tiled(inputs, **options), naive, exact)


@pytest.mark.parametrize("lanes", [4, 16])
def test_more_tiles_than_a_program_has_lanes(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srpo_kernels.kernels.launch.MERGE_TILES", lanes)
    test_parity("reverse_kl", 5.0, torch.float32, 24)
    inputs = inputs_of(torch.float32, None)
    exact = reference.token_stats(**cast(inputs, torch.float64))
    for name, value in tiled({key: x for key, x in inputs.items() if not key.startswith("teacher")}).items():
        torch.testing.assert_close(value.double(), getattr(exact, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("missing", [("bias",), ("teacher_bias",), ("bias", "teacher_bias")], ids=str)
def test_either_model_may_have_a_bias(missing: tuple[str, ...]) -> None:
    inputs = inputs_of(torch.float32) | dict.fromkeys(missing)
    exact = reference.token_stats(**cast(inputs, torch.float64), divergence="reverse_kl")._asdict()
    for name, value in tiled(inputs, divergence="reverse_kl").items():
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-5, atol=1e-5)


def test_it_holds_no_logits() -> None:
    inputs = inputs_of(torch.bfloat16) | {"mask": None}
    with MemoryMeter(*inputs.values()) as meter:
        tiled(inputs, divergence="reverse_kl")
    assert meter.largest < 35 * VOCAB_SIZE


def test_it_takes_over_where_a_row_of_logits_does_not_fit() -> None:
    inputs = inputs_of(torch.float32)
    expected = tiled(inputs, divergence="reverse_kl")
    with torch.no_grad():
        actual = token_stats(**inputs, backend="triton", divergence="reverse_kl", workspace_bytes=100)
        assert teacher_stats(inputs["hidden"], inputs["weight"], backend="triton", workspace_bytes=100)
        for name, value in expected.items():
            assert torch.equal(getattr(actual, name), value)
        with pytest.raises(ValueError, match="workspace_bytes must be at least"):
            token_stats(**inputs, backend="triton", divergence="jsd", workspace_bytes=100)
        with pytest.raises(ValueError, match="workspace_bytes must be at least"):
            token_stats(**inputs, backend="triton", divergence="reverse_kl", engine="rows", workspace_bytes=100)


def test_teacher_stats_in_tiles() -> None:
    inputs = inputs_of(torch.float32)
    call = {"teacher_hidden": inputs["hidden"], "teacher_weight": inputs["weight"], "mask": inputs["mask"]}
    actual, expected = teacher_stats(**call, backend="triton", engine="tile"), teacher_stats(**call, backend="torch")
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-5)


def test_no_row_at_all() -> None:
    inputs = inputs_of(torch.float32)
    inputs["mask"] = torch.zeros_like(inputs["mask"])
    assert all(not x.any() for x in tiled(inputs, divergence="reverse_kl").values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "tiles"}, "engine must be one of .* got 'tiles'"),
        ({"backend": "torch"}, "engine='tile' needs the triton backend, got 'torch'"),
        *(({"divergence": x}, f"engine='tile' does not support divergence='{x}'") for x in MIXTURE_DIVERGENCES),
        ({"hidden": torch.zeros(5, 7, 40, dtype=torch.bfloat16)}, "engine='tile' needs one dtype"),
    ],
    ids=["name", "backend", *MIXTURE_DIVERGENCES, "dtypes"],
)
def test_what_it_cannot_do_is_refused(change: dict[str, Any], message: str) -> None:
    call = inputs_of(torch.float32) | {"backend": "triton", "engine": "tile", "divergence": "reverse_kl"} | change
    call["hidden"] = call["hidden"].to(DEVICE)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        token_stats(**call)


def test_a_bounded_divergence_takes_the_rows() -> None:
    """Where a row of logits does not fit the workspace, too: the tiles have no entries to bound."""
    inputs, config = inputs_of(torch.float32), SRPOConfig(divergence="reverse_kl", divergence_clip=0.01)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"engine='tile' does not support divergence_clip=0\.01"):
            token_stats(**inputs, backend="triton", engine="tile", config=config)
        with pytest.raises(ValueError, match="workspace_bytes must be at least"):
            token_stats(**inputs, backend="triton", workspace_bytes=1, config=config)
        assert (
            token_stats(**inputs, backend="triton", workspace_bytes=1, divergence="reverse_kl").divergence is not None
        )


def test_a_gradient_is_refused() -> None:
    inputs = with_leaves(inputs_of(torch.float32))
    with pytest.raises(ValueError, match=r"engine='tile' has no gradient: call it under torch\.no_grad"):
        token_stats(**inputs, backend="triton", engine="tile", divergence="reverse_kl")
