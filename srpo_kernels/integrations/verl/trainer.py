"""verl's synchronous trainer with SRPO's routing, and the teacher's contexts in the queue from which engines read."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf, open_dict
from tensordict import NonTensorData, TensorDict
from torch import Tensor
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.config import omega_conf_to_dataclass

import srpo_kernels as sk
from srpo_kernels.integrations.verl.compatibility import check_signature, check_version
from srpo_kernels.integrations.verl.options import check_config
from srpo_kernels.integrations.verl.routing import (
    Outputs,
    RoutedBatch,
    Router,
    equal_groups,
    final_outputs,
    group_numbers,
)
from srpo_kernels.integrations.verl.worker import SRPOActorRolloutRefWorker

# What `trainer.v1.trainer_mode` is to verl.
TRAINER_MODE = "srpo"
# Of verl's advantages those that compare a reward with its group's.
_GROUP_ESTIMATORS = ("grpo", "grpo_vectorized", "rloo", "rloo_vectorized", "opo", "gpg")
_SUMS = "actor/srpo_sum/"

check_version()
for _name, _parameters in {
    "__init__": ("config",),
    "_init_tokenizer": (),
    "_init_resource_pool_mgr": (),
    "_compute_advantage": ("batch", "metrics"),
    "_update_actor": ("batch", "metrics"),
}.items():
    check_signature(PPOTrainerSync, _name, _parameters)


@register_trainer(TRAINER_MODE)
class SRPOTrainer(PPOTrainerSync):
    """`PPOTrainerSync` of verl with SRPO's loss (arXiv 2604.02288), its workers' engines being `SRPOEngine`.

    Takes verl's configuration and an `srpo` section, see `SRPOOptions`. Rollout, rewards, advantages, old and
    reference log-probs, rollout corrections, checkpoints and weight syncs are verl's. After the advantages come the
    routes, and for each distilled response the prompt that shows the teacher a correct sibling's.

    Logs what verl logs but the metrics of its loss hook, and ``srpo/*`` (see ``summarize_metrics``), from sums over the
    optimizer batch.

    Raises:
        ValueError: an option of the section, or of verl's own, that is not honoured; rollouts with images.
    """

    def __init__(self, config: Any) -> None:
        self._srpo = check_config(config)
        with open_dict(config):
            # The name decides replay buffer, refill and checkpoints: those are the synchronous ones.
            config.trainer.v1.trainer_mode = "sync"
            config.actor_rollout_ref.srpo = config.get("srpo") or {}
        super().__init__(config)

    def _init_tokenizer(self) -> None:
        super()._init_tokenizer()
        # Again, for what verl does not keep: the configuration with its overrides.
        model: Any = omega_conf_to_dataclass(self.config.actor_rollout_ref.model)
        stops = getattr(model.generation_config, "eos_token_id", None)
        ends = [self.tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])]
        keywords = OmegaConf.to_container(OmegaConf.create(self.config.data.get("apply_chat_template_kwargs") or {}))

        def tokenize(messages: Any) -> list[int]:
            out = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, **keywords
            )
            return list(out["input_ids"])

        self._router = Router(
            self.tokenizer,
            tokenize,
            ends={end for end in ends if end is not None},
            max_length=getattr(model.hf_config.get_text_config(), "max_position_embeddings", None),
            options=self._srpo,
        )

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in (Role.Actor, Role.ActorRollout, Role.ActorRolloutRef, Role.RefPolicy):
            if role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(SRPOActorRolloutRefWorker)

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._compute_advantage(batch, metrics)
        fields = ["uid", "prompts", "responses", "raw_prompt", "rm_scores", "response_mask", "advantages"]
        fields += ["extra_fields", "multi_modal_inputs"]
        names = [name for name in (self._srpo.success_reward, self._srpo.feedback) if name is not None]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields + names)
        if any(_plain(x) for x in data.get("multi_modal_inputs", [])):
            raise ValueError("data must be text: the teacher's prompt has no images, got multi_modal_inputs")
        rewards = torch.stack([x.sum() for x in data["rm_scores"].unbind()]).float()
        advantages = self._advantages(batch, data, rewards)
        written = {"advantages": advantages}
        if self._srpo.method != "grpo":
            routed = self._route(batch, data, rewards)
            metrics.update(routed.metrics)
            written["teacher_input_ids"] = torch.nested.as_nested_tensor(routed.contexts, layout=torch.jagged)
            written["sdpo_mask"] = routed.sdpo_mask
        return tq.kv_batch_put(
            keys=batch.keys,
            partition_id=batch.partition_id,
            fields=TensorDict(written, batch_size=len(batch)),
        )

    def _advantages(self, batch: Any, data: Any, rewards: Tensor) -> Tensor:
        """verl's, 0 where a group has nothing to compare, and everywhere with ``method="sdpo"``."""
        algorithm = self.config.algorithm
        none = torch.full((len(rewards),), self._srpo.method == "sdpo")
        if algorithm.adv_estimator in _GROUP_ESTIMATORS and not algorithm.use_kl_in_reward:
            # verl's "grpo" compares the last outputs of sessions, the others every output.
            last = final_outputs(batch.keys, batch.tags)
            compared = last if algorithm.adv_estimator == "grpo" else torch.ones_like(last)
            none |= equal_groups(rewards, list(data["uid"]), compared)
        rows = [x.masked_fill(zero, 0.0) for x, zero in zip(data["advantages"].unbind(), none, strict=True)]
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    def _route(self, batch: Any, data: Any, rewards: Tensor) -> RoutedBatch:
        final = final_outputs(batch.keys, batch.tags)
        scores = rewards
        if self._srpo.success_reward is not None:
            found = self._extra(data, self._srpo.success_reward)
            # Padding and outputs before the last one have none.
            missing = [key for key, value, last in zip(batch.keys, found, final, strict=True) if last and value is None]
            if missing:
                raise ValueError(
                    f"srpo.success_reward must be a key of the reward function's extra information, got "
                    f"{self._srpo.success_reward!r}, which {missing[0]} does not have"
                )
            scores = torch.tensor([float("nan") if value is None else float(value) for value in found])
        feedback = [None] * len(batch) if self._srpo.feedback is None else self._extra(data, self._srpo.feedback)
        outputs = Outputs(
            group_ids=group_numbers(list(data["uid"]), final),
            final=final,
            scores=scores,
            prompts=[list(_plain(x)) for x in data["raw_prompt"]],
            responses=data["responses"].unbind(),
            in_loss=torch.tensor([bool(x.any()) for x in data["response_mask"].unbind()]),
            feedback=[text or None for text in feedback],
        )
        return self._router.route(outputs, self.global_steps)

    @staticmethod
    def _extra(data: Any, name: str) -> list[Any]:
        """What the reward function, or a colocated reward model, has said beside its score, by row; None where not."""
        if name in data:
            return [_plain(x) for x in data[name]]
        extra = [_plain(x) or {} for x in data.get("extra_fields", [None] * len(data))]
        return [(x.get("reward_extra_info") or {}).get(name) for x in extra]

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._update_actor(batch, metrics)
        sums = {
            name.removeprefix(_SUMS): torch.tensor(float(np.asarray(metrics.pop(name))))
            for name in list(metrics)
            if name.startswith(_SUMS)
        }
        if sums:
            actor = self.config.actor_rollout_ref.actor
            absent = {"srpo/entropy"} if actor.entropy_coeff == 0.0 else set()
            absent |= set() if actor.use_kl_loss else {"srpo/ref_kl"}
            means = sk.summarize_metrics(sums).items()
            # verl corrects for the rollout before the loss, and logs that itself.
            metrics.update({k: x for k, x in means if k not in absent and not k.startswith("srpo/rollout_")})
        return batch


def _plain(value: Any) -> Any:
    """A row of a field that is no tensor, without tensordict's wrapper."""
    return value.data if isinstance(value, NonTensorData) else value
