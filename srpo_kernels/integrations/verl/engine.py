"""verl's FSDP engine with the loss of srpo_kernels: from hidden states, inside of the wrapped forward."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor, nn
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.utils.metric import AggregationType, Metric
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

import srpo_kernels as sk
from srpo_kernels.integrations.transformers import causal_model, config_for, head_operands
from srpo_kernels.integrations.transformers.hidden import last_hidden_states, with_whole_head
from srpo_kernels.integrations.verl.checks import check_head, check_log_probs, refuse_options, temperature_of
from srpo_kernels.integrations.verl.compatibility import check_signature, check_version
from srpo_kernels.integrations.verl.options import EngineOptions
from srpo_kernels.integrations.verl.rows import ResponseRows
from srpo_kernels.integrations.verl.taught import TaughtRows, teacher_pass
from srpo_kernels.integrations.verl.teacher import ShardAverage

T = TypeVar("T")

# What `actor_rollout_ref.model.model_type` is to verl.
MODEL_TYPE = "srpo_language_model"
# Where a sequence is in its mini-batch, under which its micro-batch finds what the teacher said of it.
ROW = "srpo_row"

check_version()
for _name, _parameters in {
    "__init__": ("model_config", "engine_config", "optimizer_config", "checkpoint_config"),
    "initialize": (),
    "_build_lora_module": ("module",),
    "prepare_model_inputs": ("micro_batch",),
    "forward_backward_batch": ("data", "loss_function", "forward_only"),
    "forward_step": ("micro_batch", "loss_function", "forward_only"),
    "optimizer_step": (),
    "to": ("device", "model", "optimizer", "grad"),
    "save_checkpoint": ("local_path", "hdfs_path", "global_step", "max_ckpt_to_keep", "kwargs"),
    "load_checkpoint": ("local_path", "hdfs_path", "del_local_after_load", "kwargs"),
}.items():
    check_signature(FSDPEngineWithLMHead, _name, _parameters)


class Step(NamedTuple):
    """What the micro-batches of a mini-batch share: options of the loss, counts of all ranks, the teacher's rows."""

    config: sk.SRPOConfig
    normalizers: sk.Normalizers
    taught: TaughtRows


@EngineRegistry.register(MODEL_TYPE, backend=["fsdp", "fsdp2"], device=["cuda", "npu", "cpu"])
class SRPOEngine(FSDPEngineWithLMHead):
    """An FSDP engine of verl whose loss, log-probs and entropies come from hidden states, without the logits.

    A mini-batch has verl's keys and, with a teacher, ``sdpo_mask`` ``[B]``, the rollouts to distill, and
    ``teacher_input_ids``, nested: what the teacher reads of these, up to the end of the response. Advantages, old and
    reference log-probs and ``rollout_is_weights`` are nested like ``responses``. The loss function that verl hands over
    is not called in training; in inference it is, on logits, as is what has no other form (``sum_pi_squared``).

    ``configure`` comes before ``initialize``. Source: SRPO (arXiv 2604.02288).

    Raises:
        ValueError: an option of verl that is not honoured, or a model whose log-probs are not those of its logits.
    """

    def __init__(self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any) -> None:
        refuse_options(model_config, engine_config)
        # What verl builds a model with an LM head for.
        model_config.model_type = "language_model"
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)
        self.options = EngineOptions()
        self.average: ShardAverage | None = None
        self._step: Step | None = None

    def configure(self, options: EngineOptions) -> None:
        """Set the options of loss and teacher."""
        self.options = options

    def initialize(self) -> None:
        """Build the model and, of a teacher that is an average, the average of its shards."""
        super().initialize()
        transform = config_for(self.model_config.hf_config)
        self._loss = replace(self.options.loss, logit_scale=transform.logit_scale, softcap=transform.softcap)
        if self.options.teacher in ("ema", "frozen") and not self.engine_config.forward_only:
            self.average = ShardAverage(self.module, self.options.teacher_update_rate)
        check_log_probs(self)

    def _build_lora_module(self, module: Any) -> Any:
        module = super()._build_lora_module(module)
        check_head(module, self.engine_config.strategy)
        return module

    # Forwards: everything from hidden states and head, where FSDP has gathered both.

    @property
    def base(self) -> Any:
        """The language model of transformers in FSDP's wrapper, and in PEFT's."""
        return causal_model(self.module)

    @property
    def sequence_group(self) -> Any:
        """The ranks of Ulysses that have parts of the same sequences, or None."""
        return self.ulysses_parallel_group if self.use_ulysses_sp else None

    def with_hidden(self, micro_batch: TensorDict, function: Callable[[ResponseRows, Tensor, nn.Module], T]) -> T:
        """``function(rows, hidden, head)`` in the place of the forward.

        ``hidden`` ``[n, H]`` predicts the tokens of ``rows.mine``. Every rank makes the call.
        """
        inputs, _ = self.prepare_model_inputs(micro_batch)
        rank = dist.get_rank(self.sequence_group) if self.sequence_group is not None else 0
        packed = inputs["attention_mask"] is None
        rows = ResponseRows.of(
            micro_batch["input_ids"], micro_batch["responses"], inputs["input_ids"].shape, packed=packed, rank=rank
        )
        base = self.base
        narrow = self._autocast_dtype != torch.float32
        autocast: AbstractContextManager[Any] = (
            torch.autocast(get_device_name(), self._autocast_dtype) if narrow else nullcontext()
        )

        def forward() -> T:
            with autocast:
                hidden = last_hidden_states(base, **inputs).flatten(0, 1)[rows.own]
                return with_whole_head(partial(function, rows), hidden, base)

        return sk.call_as_forward(self.module, forward)

    def forward_backward_batch(self, data: TensorDict, loss_function: Any, forward_only: bool = False) -> Any:
        """verl's; of a mini-batch in training the teacher's forwards come first."""
        if forward_only:
            return super().forward_backward_batch(data, loss_function, forward_only)
        if tu.get_non_tensor_data(data, "return_model_output", False):
            raise ValueError("return_model_output must be false: training has no output but loss and metrics")
        data[ROW] = torch.arange(len(data))
        try:
            self._step = self._prepare_step(data)
            return super().forward_backward_batch(data, loss_function, forward_only)
        finally:
            self._step = None

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> tuple[Tensor, Any]:
        """The loss of a micro-batch, times what FSDP divides its gradient by; or log-probs and entropies."""
        if not forward_only:
            return self._loss_step(micro_batch.to(get_device_id()))
        if loss_function is not None or tu.get_non_tensor_data(micro_batch, "calculate_sum_pi_squared", False):
            result: tuple[Tensor, Any] = super().forward_step(micro_batch, loss_function, forward_only)
            return result
        return self._statistics_step(micro_batch.to(get_device_id()))

    def _prepare_step(self, data: TensorDict) -> Step:
        config = replace(self._loss, temperature=temperature_of(data["temperature"]))
        device, group = get_device_id(), self.get_data_parallel_group()
        mask = data["response_mask"].values().bool().to(device)
        lengths = data["responses"].offsets().diff()
        sequences = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths).to(device)
        taught, sdpo = TaughtRows({}, {}), None
        if self.options.teacher is not None:
            sdpo = data["sdpo_mask"].to(device)[sequences]
            taught = teacher_pass(self, data, config)
        normalizers = sk.Normalizers.from_batch(
            mask, sdpo, taught.all_entropies(device), sequence_ids=sequences, config=config
        )
        # verl's denominators: rows that rejection takes out of the mask are in the one, empty responses in the other.
        counted = data["loss_mask"].values().to(device).sum()
        normalizers = normalizers._replace(token_count=counted).all_reduce(group)
        size = torch.tensor(int(tu.get_non_tensor_data(data, "global_batch_size", len(data))), device=device)
        return Step(config, normalizers._replace(sequence_count=size), taught)

    def _loss_step(self, micro_batch: TensorDict) -> tuple[Tensor, dict[str, Any]]:
        assert self._step is not None
        config, normalizers, taught = self._step
        device, group = get_device_id(), self.sequence_group
        order = micro_batch[ROW].tolist()
        routed = micro_batch["sdpo_mask"] if self.options.teacher is not None else None
        shown = taught.hidden_of(order, device)

        def loss(rows: ResponseRows, hidden: Tensor, head: nn.Module) -> sk.SRPOOutput:
            operands = head_operands(hidden, head)
            mine = rows.mine

            def per_token(name: str) -> Any:
                return micro_batch[name].values()[mine] if name in micro_batch else None

            teacher: dict[str, Any] = {}
            if routed is not None:
                sdpo = routed[rows.sequences]
                teacher["sdpo_mask"] = sdpo[mine]
                if shown is not None and (states := shown[mine[sdpo]]).numel():
                    teacher |= {"teacher_hidden": states, "teacher_weight": taught.weight, "teacher_bias": taught.bias}
            return sk.srpo_loss(
                operands.hidden,
                operands.weight,
                rows.target_ids[mine],
                bias=operands.bias,
                advantages=per_token("advantages"),
                mask=per_token("response_mask").bool(),
                old_log_probs=per_token("old_log_probs"),
                ref_log_probs=per_token("ref_log_prob") if config.kl_coef != 0.0 else None,
                is_weights=per_token("rollout_is_weights"),
                sequence_ids=micro_batch[ROW][rows.sequences][mine],
                normalizers=normalizers,
                sequence_parallel_group=group,
                config=config,
                workspace_bytes=self.options.workspace_bytes,
                **teacher,
            )

        out = self.with_hidden(micro_batch, loss)
        sums = torch.stack([out.loss.detach(), *out.metrics.values()])
        if group is not None:
            # A rank of Ulysses has some of the rows, and only one of them reports.
            dist.all_reduce(sums, group=group)
        # verl takes the mean over data-parallel ranks of what is here a sum.
        value, *totals = (sums * self.get_data_parallel_size()).tolist()
        metrics = {
            f"srpo_sum/{name}": Metric(AggregationType.SUM, total)
            for name, total in zip(out.metrics, totals, strict=True)
        }
        return sk.scale_for_gradient_mean(out.loss), {"loss": value, "metrics": metrics}

    def _statistics_step(self, micro_batch: TensorDict) -> tuple[Tensor, dict[str, Any]]:
        """log_probs and entropy of the responses, as verl's own forward returns them, 0 at prompts."""
        config = replace(self._loss, temperature=temperature_of(micro_batch["temperature"]))

        def statistics(rows: ResponseRows, hidden: Tensor, head: nn.Module) -> tuple[ResponseRows, sk.TokenStats]:
            operands = head_operands(hidden, head)
            return rows, sk.token_stats(
                operands.hidden,
                operands.weight,
                rows.target_ids[rows.mine],
                bias=operands.bias,
                config=config,
                workspace_bytes=self.options.workspace_bytes,
            )

        with torch.no_grad():
            rows, stats = self.with_hidden(micro_batch, statistics)
        values = {"log_probs": stats.log_probs}
        if tu.get_non_tensor_data(micro_batch, "calculate_entropy", False):
            values["entropy"] = stats.entropy
        output = {
            name: rows.in_sequences(rows.gather(value, self.sequence_group), micro_batch["input_ids"])
            for name, value in values.items()
        }
        return torch.ones((), device=get_device_id()), {"model_output": output, "loss": 1.0, "metrics": {}}

    # The average: after steps that were taken, where the parameters are, in verl's checkpoints.

    def optimizer_step(self) -> float:
        """verl's; the average moves unless verl has skipped the step, for a norm that is not finite."""
        norm: float = super().optimizer_step()
        if self.average is not None and math.isfinite(norm):
            self.average.update()
        return norm

    def to(self, device: str, model: bool = True, optimizer: bool = True, grad: bool = True) -> None:
        """verl's, with the average beside the parameters."""
        super().to(device, model, optimizer, grad)
        if self.average is not None and model:
            self.average.to(get_device_id() if device != "cpu" else "cpu")

    def save_checkpoint(
        self, local_path: str, hdfs_path: Any = None, global_step: int = 0, max_ckpt_to_keep: Any = None, **kwargs: Any
    ) -> None:
        """verl's, and this rank's average where it saves its model."""
        super().save_checkpoint(local_path, hdfs_path, global_step, max_ckpt_to_keep, **kwargs)
        if self.average is not None and local_path is not None and self.checkpoint_manager.should_save_model:
            self.average.save(local_path, self.rank, dist.get_world_size())
            dist.barrier()

    def load_checkpoint(
        self, local_path: str, hdfs_path: Any = None, del_local_after_load: bool = True, **kwargs: Any
    ) -> None:
        """verl's, and this rank's average. Raises ValueError where a checkpoint has none."""
        super().load_checkpoint(local_path, hdfs_path, del_local_after_load, **kwargs)
        if self.average is not None and local_path is not None and self.checkpoint_manager.should_load_model:
            self.average.load(local_path, self.rank, dist.get_world_size())
