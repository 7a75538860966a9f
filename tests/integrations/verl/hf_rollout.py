"""A rollout for a CPU: a Ray actor per replica that samples with transformers, and takes the weights that verl sends.

Importing this registers it as `hf_test`.
"""

from __future__ import annotations

import os
from typing import Any

import ray
import torch
import verl.workers.rollout.base as base
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

NAME = "hf_test"
# The step whose weights the last rank does not live to send, for the test of a lost worker.
DIES_AT = "SRPO_TEST_WORKER_DIES_AT"


class Server:
    """Samples one sequence at a time, up to an end or ``max_tokens``."""

    def __init__(self, path: str, config: Any) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        torch.manual_seed(0)
        self._model = AutoModelForCausalLM.from_pretrained(path).float()
        self._end, self._length, self._step = self._model.config.eos_token_id, config.response_length, 0

    @torch.no_grad()
    def load(self, weights: dict[str, Any], step: int) -> None:
        for name, parameter in self._model.named_parameters():
            parameter.copy_(weights[name].float())
        self._step = step or 0

    @torch.no_grad()
    def generate(self, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any) -> Any:
        ids, log_probs = list(prompt_ids), []
        temperature = sampling_params.get("temperature", 1.0)
        while len(log_probs) < self._length and (not log_probs or ids[-1] != self._end):
            logs = (self._model(torch.tensor([ids])).logits[0, -1] / (temperature or 1e-6)).log_softmax(-1)
            ids.append(int(torch.multinomial(logs.exp(), 1)))
            log_probs.append(float(logs[ids[-1]]))
        return TokenOutput(
            token_ids=ids[len(prompt_ids) :],
            log_probs=log_probs,
            stop_reason="completed",
            extra_fields={"global_steps": self._step},
        )

    def wake_up(self) -> None: ...

    def sleep(self) -> None: ...

    def abort_all_requests(self, reject_request: bool = False) -> None: ...

    def resume_generation(self) -> None: ...

    def clear_kv_cache(self) -> None: ...


class Replica(RolloutReplica):
    async def launch_servers(self) -> None:
        name = _name_of(self.replica_rank)
        self._server_handle = (
            ray.remote(Server).options(name=name, num_cpus=0).remote(self.model_config.path, self.config)
        )
        self.servers, self._server_address = [self._server_handle], name


class Adapter(BaseRollout):
    async def resume(self, tags: Any) -> None: ...

    async def release(self) -> None: ...

    async def update_weights(self, weights: Any, global_steps: int | None = None, **_: Any) -> None:
        weights = {name: value.detach().clone() for name, value in weights}
        rank = torch.distributed.get_rank()
        if os.environ.get(DIES_AT) == str(global_steps) and rank == torch.distributed.get_world_size() - 1:
            os._exit(1)
        await ray.get_actor(_name_of(rank)).load.remote(weights, global_steps)


def _name_of(rank: int) -> str:
    return f"{NAME}_{rank}"


base._ROLLOUT_REGISTRY[(NAME, "async")] = f"{__name__}.Adapter"
RolloutReplicaRegistry.register(NAME, lambda: Replica)
