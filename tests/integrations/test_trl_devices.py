"""SRPOTrainer with a model on two devices, as a ``device_map`` has it, trains as with one on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", "1.16", reason="the trl integration needs trl >= 1.16")

from tests.far_device import FAR, NEAR, here_and_there, split
from tests.tiny_trainer import ScriptedSRPO, curve, tiny_model, train


@pytest.mark.parametrize("kind", ["ema", "live", "other"])
def test_a_model_on_two_devices_trains_as_on_one(kind: str, tmp_path: Path) -> None:
    def run(name: str, model: Any, teacher: Any) -> Any:
        given = {"teacher_model": teacher} if kind == "other" else {}
        return train(ScriptedSRPO, tmp_path / name, model=model, teacher_model_kind=kind, optim="sgd", **given)

    alone = run("one", tiny_model(), tiny_model())
    with here_and_there():
        parts = [split(tiny_model(), NEAR, FAR, NEAR) for _ in range(2)]
        together = run("two", *parts)
    assert curve(alone, "srpo/sdpo_token_fraction")[0] > 0.0
    assert together.model.model.norm.weight.device == FAR
    for metric in ("loss", "grad_norm", *(key for key in alone.state.log_history[0] if key.startswith("srpo/"))):
        assert curve(together, metric) == pytest.approx(curve(alone, metric), rel=1e-5, abs=1e-6), metric
