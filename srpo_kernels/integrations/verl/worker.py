"""verl's workers with an `SRPOEngine`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from srpo_kernels.integrations.verl.compatibility import check_signature
from srpo_kernels.integrations.verl.engine import MODEL_TYPE
from srpo_kernels.integrations.verl.options import EngineOptions, SRPOOptions, engine_options

check_signature(TrainingWorker, "__init__", ("config",))
check_signature(ActorRolloutRefWorker, "init_model", ())


class SRPOTrainingWorker(TrainingWorker):
    """verl's training worker; its engine is an `SRPOEngine` with these options."""

    def __init__(self, config: Any, options: EngineOptions) -> None:
        super().__init__(replace(config, model_type=MODEL_TYPE))
        self.engine.configure(options)


class SRPOActorRolloutRefWorker(ActorRolloutRefWorker):
    """verl's worker of actor, rollout and reference; its configuration has an `srpo` section beside `actor`."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """verl's, with both models in an `SRPOEngine`."""
        options = engine_options(SRPOOptions.of(self.config.get("srpo")), self.config.actor)
        # verl calls both with a keyword, config.
        self.actor_worker_cls = partial(SRPOTrainingWorker, options=options)
        self.ref_worker_cls = partial(SRPOTrainingWorker, options=replace(options, teacher=None))
        super().init_model()
