"""``sequence_parallel_group``: what crosses ranks, and the other ways to call. ``test_any_split`` has the results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import reference
from srpo_kernels import Normalizers, SRPOConfig, SRPOLoss, srpo_loss
from srpo_kernels.losses.options import LOSS_TYPES
from srpo_kernels.losses.registry import POLICY_LOSSES
from tests.comparison import Results, assert_same, run_loss
from tests.engine.test_any_split import part_of
from tests.inputs import Inputs, cast, loss_inputs
from tests.processes import interpreted, needs_gloo, run_ranks
from tests.wire import Wire

pytestmark = needs_gloo

# All-gathers of a call with both gradients, and all-reduces.
WIRE = {
    **{
        name: (SRPOConfig(loss_type=name), (0, 0))
        for name in LOSS_TYPES
        if not (POLICY_LOSSES[name].whole_sequences or POLICY_LOSSES[name].whole_batch)
    },
    "constant": (SRPOConfig(reduction="constant", max_length=9), (0, 0)),
    "sequence": (SRPOConfig(reduction="sequence"), (3, 0)),
    # Two of ids, one of what moves, the sums and their gradient; luspo's lengths.
    "gspo": (SRPOConfig(loss_type="gspo"), (5, 0)),
    "gspo, kl": (SRPOConfig(loss_type="gspo", kl_coef=0.1), (4, 0)),
    "gspo, sequence": (SRPOConfig(loss_type="gspo", reduction="sequence"), (6, 0)),
    "luspo": (SRPOConfig(loss_type="luspo"), (6, 0)),
}
GSPO = SRPOConfig(loss_type="gspo")


def piece(rank: int, *, ends: tuple[int, ...]) -> Inputs:
    """This rank's positions of every sequence, up to ``ends``; float32."""
    inputs = cast(loss_inputs(0, (5, 7), teacher_size=5), torch.float32)
    start, stop = (0, *ends)[rank : rank + 2]
    return part_of(inputs, torch.ones(5) > 0, slice(start, stop)).inputs


def options() -> dict[str, Any]:
    mask = cast(loss_inputs(0, (5, 7), teacher_size=5), torch.float32)["mask"]
    normalizers = Normalizers(mask.sum(), torch.tensor(-2.0), sequence_count=torch.tensor(5))
    return {"normalizers": normalizers, "sequence_parallel_group": dist.group.WORLD}


def call(rank: int) -> tuple[dict[str, tuple[int, int]], list[Results]]:
    # The second rank has no position.
    counts = {}
    for name, (config, _) in WIRE.items():
        with Wire() as wire:
            run_loss(srpo_loss, piece(rank, ends=(7, 7)), config=config, **options())
        counts[name] = (len(wire.gathered), len(wire.reduced))

    inputs = piece(rank, ends=(2, 7))
    eager = run_loss(srpo_loss, inputs, config=GSPO, **options())
    compiled = torch.compile(SRPOLoss(GSPO), backend="aot_eager", fullgraph=True)
    assert_same(run_loss(compiled, inputs, **options()), eager, 0.0)
    with torch.no_grad():
        assert torch.equal(srpo_loss(**inputs, config=GSPO, **options()).loss, eager["loss"])

    with pytest.raises(ValueError, match="normalizers is required with sequence_parallel_group"):
        srpo_loss(**inputs, sequence_parallel_group=dist.group.WORLD)
    return counts, [eager]


def test_collectives_and_ways_to_call() -> None:
    ranks = run_ranks(call, 2)
    expected = {name: traffic for name, (_, traffic) in WIRE.items()}
    assert [counts for counts, _ in ranks] == [expected, expected]
    inputs = cast(loss_inputs(0, (5, 7), teacher_size=5), torch.float64)
    whole = run_loss(
        reference.srpo_loss,
        inputs,
        config=GSPO,
        normalizers=Normalizers(inputs["mask"].sum(), torch.tensor(-2.0), sequence_count=torch.tensor(5)),
    )
    (first,), (second,) = (results for _, results in ranks)
    added = {name: first[name] + second[name] for name in ("loss", "grad weight", "grad bias")}
    added["grad hidden"] = torch.cat([first["grad hidden"], second["grad hidden"]], dim=1)
    assert_same(added, {name: whole[name] for name in added}, 1e-5)


def call_kernels(rank: int) -> None:
    import tests.conftest  # noqa: F401  Triton's interpreter as the other tests have it.

    inputs = piece(rank, ends=(2, 7))
    eager, kernels = (
        run_loss(srpo_loss, inputs, config=GSPO, backend=backend, **options()) for backend in ("torch", "triton")
    )
    assert_same(kernels, eager, 2e-5)


@interpreted
def test_kernels_in_ranks() -> None:
    run_ranks(call_kernels, 2)
