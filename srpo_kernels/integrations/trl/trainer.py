"""`GRPOTrainer` with the loss of srpo_kernels."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

import srpo_kernels as sk
from srpo_kernels.integrations.transformers import check_model, logit_transform, response_normalizers
from srpo_kernels.integrations.trl.config import SRPOTrainerConfig
from srpo_kernels.integrations.trl.forwards import Forwards, valid_tokens
from srpo_kernels.integrations.trl.metrics import micro_batch_metrics, step_means
from srpo_kernels.integrations.trl.rewards import correctness_scores, equal_groups, route_completions
from srpo_kernels.integrations.trl.solutions import Solutions
from srpo_kernels.integrations.trl.teacher import Teacher


class SRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with SRPO's loss (arXiv 2604.02288), computed from hidden states without the logits.

    Takes the arguments of `GRPOTrainer` except tools, rollout_func and environment_factory, with an
    `SRPOTrainerConfig`. A completion is scored by TRL; then ``route_samples`` sends it to the policy loss or to
    distillation from a correct sibling, whose text is shown to the teacher. The teacher runs on the distilled
    completions alone, at the start of each optimizer step, so that its entropies and the token counts of the whole
    optimizer batch, of all processes, normalize every micro-batch: the loss does not depend on how the batch is
    split. Completions that cannot move a weight (advantage 0, not distilled) get no forward.

    Logs what `GRPOTrainer` logs, with its values, and ``srpo/*`` (see ``summarize_metrics``), from sums over the
    optimizer batch. TRL's ``entropy`` is there with ``entropy_coef`` and ``method="grpo"`` alone.

    Raises:
        TypeError: ``args`` is no `SRPOTrainerConfig`.
        ValueError: an argument, a model or a distributed set-up that is not supported.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "srpo"]
    _name = "SRPO"
    _paper: ClassVar[dict[str, str]] = {
        "title": "SRPO: Sample-Routed Policy Optimization",
        "id": "2604.02288",
        "citation": textwrap.dedent("""\
            @article{srpo2026,
                title  = {{SRPO: Sample-Routed Policy Optimization}},
                year   = 2026,
                eprint = {arXiv:2604.02288}
            }"""),
    }

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: SRPOTrainerConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        **unsupported: Any,
    ) -> None:
        for name, value in unsupported.items():
            if value is not None:
                raise ValueError(f"{name} is not supported by SRPOTrainer: the teacher's prompt is text of one turn")
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = SRPOTrainerConfig(f"{name.split('/')[-1]}-SRPO")
        if not isinstance(args, SRPOTrainerConfig):
            raise TypeError(f"args must be an SRPOTrainerConfig, got {type(args).__name__}")
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self._refuse_models()
        self.loss_config = args.loss_config(logit_transform(self.model.config))
        check_model(self.model, self.loss_config)
        self._forwards = Forwards(
            self.accelerator,
            self.loss_config,
            in_head_dtype=args.cast_lm_head_to_fp32,
            workspace_bytes=args.workspace_bytes,
        )
        self._deciding_reward = self._index_of_reward(args.success_reward)
        self._solutions = Solutions(
            self._tokenizer,
            lambda prompt: list(self._tokenize_prompts([prompt])[0][0]),
            ends={*self.eos_token_ids, self._tokenizer.pad_token_id},
            max_length=self._max_teacher_length(),
            args=args,
        )
        rate = args.teacher_update_rate if args.teacher_model_kind == "ema" and args.method != "grpo" else None
        self.teacher = Teacher(self.model, rate)
        self.add_callback(self.teacher)
        self._metric_sums: dict[str, Tensor] = {}

    def _refuse_models(self) -> None:
        if self._is_vlm:
            raise ValueError("processing_class must be a tokenizer, got a processor: SRPOTrainer trains text models")
        if self.aux_loss_enabled:
            raise ValueError("router_aux_loss_coef must be 0.0 with SRPOTrainer: the fused loss has no auxiliary loss")
        for enabled, name in ((self.is_deepspeed_enabled, "deepspeed"), (self.is_fsdp_enabled, "fsdp")):
            if enabled:
                raise ValueError(
                    f"{name} is not supported by SRPOTrainer: one process or DDP, where a rank has the head"
                )

    def _index_of_reward(self, name: str | None) -> int | None:
        if name is not None and self.reward_func_names.count(name) != 1:
            raise ValueError(
                f"success_reward must be the name of one of reward_funcs, {self.reward_func_names}, got {name!r}"
            )
        return None if name is None else self.reward_func_names.index(name)

    def _max_teacher_length(self) -> int | None:
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        length = self.args.max_teacher_length
        if length is not None and positions is not None and length > positions:
            raise ValueError(f"max_teacher_length must be at most the model's {positions} positions, got {length}")
        return positions if length is None else length

    # Scoring: who is distilled, and from which sibling.

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards_per_func: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._rewards_per_func, self._completion_ids = rewards_per_func, completion_ids_list
        return rewards_per_func

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        rewards = self._rewards_per_func
        if rewards.isinf().any():
            raise ValueError(f"reward_funcs must return finite rewards or None, got {rewards.tolist()}")
        first = self.accelerator.process_index * len(inputs)
        own = slice(first, first + len(inputs))
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        equal = equal_groups(rewards, self.reward_weights, group_size, self.multi_objective_aggregation)
        output["advantages"] = output["advantages"].masked_fill(equal[own].to(rewards.device), 0.0)
        if self.args.method == "sdpo":
            output["advantages"] = torch.zeros_like(output["advantages"])
        output["sdpo_mask"] = torch.zeros(len(inputs), dtype=torch.bool, device=rewards.device)
        # A list, which TRL shuffles and splits with the tensors.
        output["teacher_prompt_ids"] = [[] for _ in inputs]
        if self.args.method != "grpo":
            self._route(inputs, output, own, group_size)
        return output

    def _route(self, inputs: list[dict[str, Any]], output: dict[str, Any], own: slice, group_size: int) -> None:
        """Set who of this process's completions, ``own`` of all, is distilled, and from which prompt."""
        scores = correctness_scores(self._rewards_per_func, self.reward_weights, self._deciding_reward)
        correct = scores >= self.args.success_threshold
        # Nobody scored NaN: neither correct, nor to be distilled.
        distillable = ~scores.isnan() if self.args.method == "sdpo" else scores < self.args.success_threshold

        lengths = torch.tensor(gather_object([len(ids) for ids in self._completion_ids]), device=scores.device)
        longest = lengths.masked_fill(~distillable, 0).unflatten(0, (-1, group_size)).amax(1)
        in_loss = valid_tokens(output).any(1)
        shown: list[list[int] | None] = gather_object(
            self._solutions.prompts(
                [example["prompt"] for example in inputs],
                self._completion_ids,
                (correct[own] & in_loss).tolist(),
                longest.repeat_interleave(group_size)[own].tolist(),
            )
        )
        showable = torch.tensor([ids is not None for ids in shown], device=scores.device)
        # The same draw on every process, and after a resume.
        seed = self.args.seed + self.state.global_step
        sdpo_mask, teacher_index = route_completions(showable, distillable, group_size, seed)
        output["sdpo_mask"] = sdpo_mask[own] & in_loss
        for row in output["sdpo_mask"].nonzero().flatten().tolist():
            output["teacher_prompt_ids"][row] = shown[int(teacher_index[own][row])]
        if correct.any():
            fraction = (showable.sum() / correct.sum()).item()
            self._metrics["train" if self.model.training else "eval"]["srpo/shown_fraction"].append(fraction)

    # Log-probs of the old and the reference policy.

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """TRL's log-probs ``[B, T]`` and entropies of completions, from the operands and in the dtype of the loss.

        With those of another operator the ratio of a policy to itself is not 1. The arguments of other modalities,
        which TRL passes too, are None for the models that this trainer takes.
        """
        size = batch_size or len(input_ids)
        parts = [
            self._forwards.completion_stats(model, ids, mask, logits_to_keep)
            for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True)
        ]
        log_probs, entropy = (torch.cat([part[index] for part in parts]) for index in (0, 1))
        return log_probs, entropy if compute_entropy else None, None

    # The teacher, and what the micro-batches of an optimizer step agree on.

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        parts, accumulation = [inputs], self.args.gradient_accumulation_steps
        if self.model.training:
            if self._step % accumulation:
                return inputs
            first = self._step % self.args.steps_per_generation
            parts = self._buffered_inputs[first : first + accumulation]
        if not self.model.training or self._buffered_inputs is not before:
            # The model that generated them is the one that runs now.
            for part in parts:
                part.pop("old_per_token_logps", None)
        self._prepare_step(parts)
        return inputs

    def _prepare_step(self, parts: list[dict[str, Any]]) -> None:
        normalizers = []
        for part in parts:
            part["teacher"] = self._forwards.teacher_rows(self.teacher, part, self._tokenizer.pad_token_id)
            mask = valid_tokens(part)
            counts = response_normalizers(mask, part["sdpo_mask"], part["teacher"], config=self.loss_config)
            # TRL's mean over completions is over masked ones too.
            normalizers.append(counts._replace(sequence_count=torch.tensor(len(mask), device=mask.device)))
        step = normalizers[0].merge(*normalizers[1:]).all_reduce()
        for part in parts:
            part["normalizers"] = step

    # The loss.

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        out = self._forwards.loss(model, inputs)
        self._log_micro_batch(inputs, out)
        if self.model.training and self.num_iterations > 1:
            # Not there in the first pass, whose model is the one that generated them.
            inputs.setdefault("old_per_token_logps", out.log_probs)
        # DDP takes the mean over processes; the normalizers are already those of all of them.
        scaled: Tensor = out.loss * self.accelerator.num_processes
        return scaled

    # Metrics and checkpoints.

    def _log_micro_batch(self, inputs: dict[str, Any], out: sk.SRPOOutput) -> None:
        """Log TRL's metrics of a micro-batch and, at the end of an optimizer step, the means of ours."""
        training = self.model.training
        logged = self._metrics["train" if training else "eval"]
        means = micro_batch_metrics(inputs, out, valid_tokens(inputs), self.args, self.accelerator, training=training)
        self._metric_sums = {name: value + self._metric_sums.get(name, 0) for name, value in out.metrics.items()}
        if not training or (self._step + 1) % self.args.gradient_accumulation_steps == 0:
            names = list(self._metric_sums)
            sums = self.accelerator.reduce(torch.stack([self._metric_sums[name].float() for name in names]), "sum")
            totals = dict(zip(names, sums.unbind(), strict=True))
            means |= step_means(totals, inputs["normalizers"].token_count, self.args)
            self._metric_sums = {}
            if training and self.args.entropy_coef != 0.0:
                means["entropy_coef"] = self.args.entropy_coef
        for name, value in means.items():
            logged[name].append(value)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            self.teacher.save(
                Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.teacher.load(Path(checkpoint))
