"""Models in shards of tensor parallelism, whose ranks have to read the same rows."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from accelerate.utils import send_to_device
from torch.distributed import ProcessGroup
from transformers import set_seed
from trl import GRPOTrainer

from srpo_kernels.integrations.transformers.shards import tensor_parallel_group


class SharedRowsTrainer(GRPOTrainer):
    """The part of `SRPOTrainer` that gives every rank of a tensor-parallel group what the first of them has.

    accelerate deals the same prompts to them. TRL counts and samples as if each rank had its own: the counts are the
    group's size too large, in numerators and denominators alike, and what is sampled, scored and routed is sent.
    """

    # None without tensor parallelism.
    _tp_group: ProcessGroup | None = None

    @property
    def _tp_size(self) -> int:
        return 1 if self._tp_group is None else self._tp_group.size()

    def _share_rows(self) -> None:
        """Find the group. Its ranks draw the same numbers from here on, for dropout and for the order of rows."""
        self._tp_group = tensor_parallel_group(self.model)
        if self.get_tp_size() != self._tp_size:
            raise ValueError(
                "model must be loaded in shards by transformers, with tp_size in a distributed_config, where "
                f"parallelism_config or DeepSpeed has tensor parallelism, got one in {self._tp_size} parts and "
                f"tp_size={self.get_tp_size()}"
            )
        if self._tp_group is None:
            return
        generated = self._train_batch_size * self.args.steps_per_generation
        batches = [("steps_per_generation", generated, self.num_generations)]
        if self.eval_dataset is not None:
            evaluated = self.args.per_device_eval_batch_size
            batches.append(("per_device_eval_batch_size", evaluated, self.num_generations_eval))
        for name, rows, size in batches:
            if rows % size:
                raise ValueError(
                    f"{name} must give a process whole groups with tensor parallelism, got {rows} completions of a "
                    f"process in groups of {size}"
                )
        configured = self.args.parallelism_config
        if self.args.questions_per_batch is not None and (configured is None or configured.tp_size != self._tp_size):
            raise ValueError(
                f"questions_per_batch must come with a parallelism_config of tp_size={self._tp_size}, which says how "
                f"many processes have the same questions, got {configured}"
            )
        set_seed(self.args.seed + dist.get_global_rank(self._tp_group, 0))

    def _shared(self, value: Any) -> Any:
        """What the first rank of the group has."""
        if self._tp_group is None:
            return value
        sent = [send_to_device(value, "cpu")]
        dist.broadcast_object_list(sent, group_src=0, group=self._tp_group)
        return send_to_device(sent[0], self.accelerator.device)

    def _get_train_sampler(self, *arguments: Any, **keywords: Any) -> Any:
        sampler = super()._get_train_sampler(*arguments, **keywords)
        # One generation batch is of the ranks that have rows of their own.
        sampler.batch_size //= self._tp_size
        return sampler

    def _generate_single_turn(self, *arguments: Any, **keywords: Any) -> Any:
        # Before each turn, too: what the ranks read next is what they have said.
        return self._shared(super()._generate_single_turn(*arguments, **keywords))

    def _generate(self, prompts: list[Any]) -> Any:
        before = self.state.num_input_tokens_seen
        # A ``rollout_func`` has turns of its own.
        result = self._shared(super()._generate(prompts))
        self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // self._tp_size
        self._metrics["train" if self.model.training else "eval"]["num_tokens"] = [self.state.num_input_tokens_seen]
        return result
