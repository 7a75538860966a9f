"""`GRPOTrainer` with the loss of srpo_kernels."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from accelerate.utils import gather_object, is_peft_model
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

import srpo_kernels as sk
from srpo_kernels.integrations.trl.config import SRPOTrainerConfig
from srpo_kernels.integrations.trl.head import add_hidden_output, check_head, head_operands, logit_transform
from srpo_kernels.integrations.trl.metrics import step_means
from srpo_kernels.integrations.trl.teacher import Teacher, pad_left, teacher_prompt


class TeacherRows(NamedTuple):
    """The teacher of a micro-batch: hidden states ``[N_sdpo, H]`` of its valid routed rows, and entropies.

    ``entropy`` is ``[B_sdpo, T]``, 0 at other rows; None where no weight needs it.
    """

    hidden: Tensor
    entropy: Tensor | None


class SRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with SRPO's loss (arXiv 2604.02288), computed from hidden states without the logits.

    Takes the arguments of `GRPOTrainer` except tools, rollout_func and environment_factory, with an
    `SRPOTrainerConfig`. A completion is scored by TRL; then ``route_samples`` sends it to the policy loss or to
    distillation from a correct sibling, whose text is shown to the teacher. The teacher runs on the distilled
    completions alone, at the start of each optimizer step, so that its entropies and the token counts of the whole
    optimizer batch, of all processes, normalize every micro-batch: the loss does not depend on how the batch is
    split. Completions that cannot move a weight (advantage 0, not distilled) get no forward.

    Logs what `GRPOTrainer` logs and ``srpo/*`` (see ``summarize_metrics``), from sums over the optimizer batch.
    Of TRL's metrics, ``entropy`` is there with ``entropy_coef`` alone, and the extrema of ``clip_ratio`` are not.

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
        transform = logit_transform(self.model.config)
        add_hidden_output(self.model.get_base_model() if is_peft_model(self.model) else self.model)
        check_head(self.model, transform)
        self.loss_config = args.loss_config(*transform)
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

    # Scoring: who is distilled, and from which sibling.

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards_per_func: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._rewards_per_func = rewards_per_func
        return rewards_per_func

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        first = self.accelerator.process_index * len(inputs)
        sdpo_mask, teacher_index = self._route()
        output["sdpo_mask"] = sdpo_mask[first : first + len(inputs)]
        if self.args.method == "sdpo":
            output["advantages"] = torch.zeros_like(output["advantages"])

        # A list, which TRL shuffles and splits with the tensors.
        output["teacher_prompt_ids"] = [[] for _ in inputs]
        if self.args.method == "grpo":
            return output
        texts = self.processing_class.batch_decode(output["completion_ids"], skip_special_tokens=True)
        solutions = gather_object(texts)
        routed = output["sdpo_mask"].nonzero().flatten().tolist()
        if routed:
            shown = [
                teacher_prompt(
                    inputs[row]["prompt"], solutions[int(teacher_index[first + row])], self.args.teacher_template
                )
                for row in routed
            ]
            for row, ids in zip(routed, self._tokenize_prompts(shown)[0], strict=True):
                output["teacher_prompt_ids"][row] = list(ids)
        return output

    def _route(self) -> tuple[Tensor, Tensor]:
        """Of all completions of all processes: whether it is distilled, and the sibling that teaches it."""
        rewards_per_func = self._rewards_per_func
        rewards = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(1)
        # Nobody scored it: neither correct, nor to be distilled.
        unscored = rewards_per_func.isnan().all(1)
        rewards[unscored] = self.args.success_threshold - 1.0
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        group_ids = torch.arange(len(rewards), device=rewards.device) // group_size
        # The same draw on every process, and after a resume.
        generator = torch.Generator().manual_seed(self.args.seed + self.state.global_step)
        routing = sk.route_samples(rewards, group_ids, self.args.success_threshold, generator=generator)
        if self.args.method == "grpo":
            return torch.zeros_like(routing.sdpo_mask), routing.teacher_index
        sdpo_mask = routing.teacher_index >= 0 if self.args.method == "sdpo" else routing.sdpo_mask
        return sdpo_mask & ~unscored, routing.teacher_index

    # The teacher, and what the micro-batches of an optimizer step agree on.

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        if not self.model.training:
            self._prepare_step([inputs])
        elif self._step % self.args.gradient_accumulation_steps == 0:
            first = self._step % self.args.steps_per_generation
            self._prepare_step(self._buffered_inputs[first : first + self.args.gradient_accumulation_steps])
        return inputs

    def _prepare_step(self, parts: list[dict[str, Any]]) -> None:
        normalizers = []
        for part in parts:
            part["teacher"] = self._teacher_rows(part)
            entropy = None if part["teacher"] is None else part["teacher"].entropy
            mask = part["completion_mask"].bool()
            counts = sk.Normalizers.from_batch(mask, part["sdpo_mask"], entropy, config=self.loss_config)
            # TRL's mean over completions is over masked ones too.
            normalizers.append(counts._replace(sequence_count=torch.tensor(len(mask), device=mask.device)))
        step = normalizers[0].merge(*normalizers[1:]).all_reduce()
        for part in parts:
            part["normalizers"] = step

    @torch.no_grad()
    def _teacher_rows(self, part: dict[str, Any]) -> TeacherRows | None:
        routed = part["sdpo_mask"]
        mask = part["completion_mask"][routed]
        if not mask.any():
            return None
        prompts = [ids for ids, is_routed in zip(part["teacher_prompt_ids"], routed.tolist(), strict=True) if is_routed]
        prompt_ids, prompt_mask = pad_left(prompts, self._tokenizer.pad_token_id, mask.device)
        valid = mask.bool()

        def rows(hidden: Tensor, head: nn.Linear) -> TeacherRows:
            hidden, weight, bias = self._head_operands(hidden[:, -valid.shape[1] - 1 : -1], head)
            if self.args.dw_beta == 0.0:
                return TeacherRows(hidden[valid], None)
            stats = sk.teacher_stats(
                hidden,
                weight,
                mask=valid,
                teacher_bias=bias,
                config=self.loss_config,
                workspace_bytes=self.args.workspace_bytes,
            )
            return TeacherRows(hidden[valid], stats.entropy)

        with self.accelerator.autocast():
            result: TeacherRows = self.teacher(
                input_ids=torch.cat([prompt_ids, part["completion_ids"][routed]], 1),
                attention_mask=torch.cat([prompt_mask, mask], 1),
                on_hidden=rows,
            )
        return result

    def _head_operands(self, hidden: Tensor, head: nn.Linear) -> Any:
        return head_operands(hidden, head, in_head_dtype=self.args.cast_lm_head_to_fp32)

    # The loss.

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        rows = self._rows_to_run(inputs)
        mask = inputs["completion_mask"][rows].bool()
        sequence_ids = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)
        advantages = inputs["advantages"][rows, None].expand_as(mask)
        sdpo_mask = inputs["sdpo_mask"][rows, None].expand_as(mask)
        teacher: TeacherRows | None = inputs["teacher"]

        def packed(name: str) -> Tensor | None:
            values = inputs.get(name)
            return None if values is None else values[rows].expand_as(mask)[mask]

        def loss(hidden: Tensor, head: nn.Linear) -> sk.SRPOOutput:
            # Only valid rows: padding costs neither memory nor products from here on.
            operands = self._head_operands(hidden[:, -mask.shape[1] - 1 : -1][mask], head)
            teacher_head = None if teacher is None else self._teacher_head(head, operands.weight.dtype)
            return sk.srpo_loss(
                operands.hidden,
                operands.weight,
                inputs["completion_ids"][rows][mask],
                advantages=advantages[mask],
                sdpo_mask=None if teacher is None else sdpo_mask[mask],
                teacher_hidden=None if teacher is None else teacher.hidden,
                teacher_weight=None if teacher_head is None else teacher_head[0],
                bias=operands.bias,
                teacher_bias=None if teacher_head is None else teacher_head[1],
                old_log_probs=packed("old_per_token_logps"),
                ref_log_probs=packed("ref_per_token_logps"),
                is_weights=packed("importance_sampling_ratio"),
                sequence_ids=sequence_ids[mask],
                normalizers=inputs["normalizers"],
                config=self.loss_config,
                workspace_bytes=self.args.workspace_bytes,
            )

        ids = torch.cat([inputs["prompt_ids"][rows], inputs["completion_ids"][rows]], 1)
        attention_mask = torch.cat([inputs["prompt_mask"][rows], inputs["completion_mask"][rows]], 1)
        with self.accelerator.autocast():
            out = model(input_ids=ids, attention_mask=attention_mask, on_hidden=loss)
        self._count(out.metrics, inputs["normalizers"])
        # DDP takes the mean over processes; the normalizers are already those of all of them.
        scaled: Tensor = out.loss * self.accelerator.num_processes
        return scaled

    def _teacher_head(self, head: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        weight = self.teacher.value(head.weight).to(dtype)
        return weight, None if head.bias is None else self.teacher.value(head.bias).to(dtype)

    def _rows_to_run(self, inputs: dict[str, Any]) -> Tensor:
        """Indices of the sequences that can move a weight; the first one where none can, for a loss of 0."""
        moving = inputs["sdpo_mask"] | (inputs["advantages"] != 0.0)
        if self.loss_config.kl_coef != 0.0 or self.loss_config.entropy_coef != 0.0:
            moving = torch.ones_like(moving)
        moving &= inputs["completion_mask"].bool().any(1)
        moving[0] |= ~moving.any()
        rows: Tensor = moving.nonzero().flatten()
        return rows

    # Metrics and checkpoints.

    def _count(self, metrics: dict[str, Tensor], normalizers: sk.Normalizers) -> None:
        """Add a micro-batch's sums; at the end of an optimizer step, log their means over all processes."""
        self._metric_sums = {name: value + self._metric_sums.get(name, 0) for name, value in metrics.items()}
        training = self.model.training
        if training and (self._step + 1) % self.args.gradient_accumulation_steps:
            return
        names = list(self._metric_sums)
        sums = self.accelerator.reduce(torch.stack([self._metric_sums[name].float() for name in names]), "sum")
        totals = dict(zip(names, sums.unbind(), strict=True))
        means = step_means(totals, normalizers.token_count, self.loss_config)
        for name, value in means.items():
            self._metrics["train" if training else "eval"][name].append(value)
        self._metric_sums = {}

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
