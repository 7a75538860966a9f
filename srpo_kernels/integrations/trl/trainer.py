"""`GRPOTrainer` with the loss of srpo_kernels."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, ClassVar

import torch.distributed as dist
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import create_model_from_path

from srpo_kernels.integrations.transformers import check_model, logit_transform
from srpo_kernels.integrations.transformers.shards import tensor_parallel_group
from srpo_kernels.integrations.transformers.solutions import Solutions
from srpo_kernels.integrations.trl.config import SRPOTrainerConfig
from srpo_kernels.integrations.trl.forwards import Forwards
from srpo_kernels.integrations.trl.images import media_tokens
from srpo_kernels.integrations.trl.losses import reasons_for_log_probs
from srpo_kernels.integrations.trl.steps import SteppingTrainer
from srpo_kernels.integrations.trl.teacher import Teacher


class SRPOTrainer(SteppingTrainer):
    """`trl.GRPOTrainer` with SRPO's loss (arXiv 2604.02288), computed from hidden states without the logits.

    Takes the arguments of `GRPOTrainer`, with an `SRPOTrainerConfig`, and ``teacher_model``. A completion is scored by
    TRL; then ``route_samples`` sends it to the policy loss or to distillation from a correct sibling, whose text is
    shown to the teacher. The teacher runs on the distilled completions alone, at the start of each optimizer step, so
    that its entropies and the token counts of the whole optimizer batch, of all processes, normalize every
    micro-batch: the loss does not depend on how the batch is split. Completions that cannot move a weight (advantage 0,
    not distilled) are in no backward.

    Logs what `GRPOTrainer` logs, with its values, and ``srpo/*`` (see ``summarize_metrics``), from sums over the
    optimizer batch. docs/trainers.md has every option of `GRPOConfig` and what it is here.

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
        *arguments: Any,
        teacher_model: Any = None,
        **keywords: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = SRPOTrainerConfig(f"{name.split('/')[-1]}-SRPO")
        if not isinstance(args, SRPOTrainerConfig):
            raise TypeError(f"args must be an SRPOTrainerConfig, got {type(args).__name__}")
        if args.method == "distill" and reward_funcs is None and "environment_factory" not in keywords:
            reward_funcs = no_reward
        super().__init__(
            model, reward_funcs, args, train_dataset, eval_dataset, processing_class, *arguments, **keywords
        )
        self._share_rows()
        self._refuse_models()
        self._from_log_probs = bool(reasons_for_log_probs(args)) or _scores_by_itself(type(self))
        transform = logit_transform(self.model.config)
        self.loss_config = args.loss_config(transform, has_policy=not self._from_log_probs)
        check_model(self.model, self.loss_config, padding_free=args.padding_free)
        self._forwards = Forwards(
            self.accelerator,
            self.loss_config,
            in_head_dtype=args.cast_lm_head_to_fp32,
            padding_free=args.padding_free,
            workspace_bytes=args.workspace_bytes,
        )
        self._deciding_reward = self._index_of_reward(args.success_reward)
        self._solutions = Solutions(
            self._tokenizer,
            self._tokenize_for_teacher,
            ends={*self.eos_token_ids, self._tokenizer.pad_token_id},
            max_length=self._max_teacher_length(),
            media=media_tokens(self.processing_class) if self._is_vlm else (),
            args=args,
        )
        self.teacher = self._make_teacher(teacher_model)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self.teacher.on_train_begin()
        self.add_callback(self.teacher)
        self._metric_sums = {}

    def _refuse_models(self) -> None:
        if self._is_vlm and self.args.padding_free:
            raise ValueError("padding_free must be False with a processor: the positions of images are the model's own")

    def _max_teacher_length(self) -> int | None:
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        length = self.args.max_teacher_length
        if length is not None and positions is not None and length > positions:
            raise ValueError(f"max_teacher_length must be at most the model's {positions} positions, got {length}")
        return positions if length is None else length

    def _make_teacher(self, given: Any) -> Teacher:
        args = self.args
        if (args.teacher_model_kind == "other") != (given is not None or args.teacher_model_name_or_path is not None):
            raise ValueError(
                "teacher_model, or teacher_model_name_or_path, must be given with teacher_model_kind='other' and only "
                f"then, got {args.teacher_model_kind!r} and {given if given is None else type(given).__name__}"
            )
        if args.teacher_model_kind != "other":
            kind = "live" if args.method == "grpo" else args.teacher_model_kind
            return Teacher(kind, lambda: self.model, rate=args.teacher_update_rate, every=args.teacher_update_every)
        if given is None:
            options = {"dtype": self.model.dtype, "device_map": None} | dict(args.model_init_kwargs or {})
            given = create_model_from_path(args.teacher_model_name_or_path, **options)
        groups = [self._tp_group, tensor_parallel_group(given)]
        ranks = [None if group is None else dist.get_process_group_ranks(group) for group in groups]
        if ranks[1] not in (None, ranks[0]):
            raise ValueError(
                "teacher_model must be whole or in tensor-parallel shards on the ranks that model has them on, which "
                f"read the same rows, {ranks[0]}, got {ranks[1]}"
            )
        sizes = [len(one.get_output_embeddings().weight) for one in (given, self.model)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"teacher_model must have the vocabulary of model, {sizes[1]} tokens, got {sizes[0]}")
        if self.is_deepspeed_enabled:
            given = prepare_deepspeed(given, self.accelerator)
        elif self.is_fsdp_enabled:
            given = prepare_fsdp(given, self.accelerator)
        elif len(set(getattr(given, "hf_device_map", {}).values())) <= 1:
            given = given.to(self.accelerator.device)
        # The engine's eval returns nothing.
        given.eval()
        return Teacher("other", lambda: given, rate=0.0, every=1)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.teacher.save(folder, writes=self.args.should_save)
        self._save_generation_batch(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.teacher.load(Path(checkpoint))
            self._load_generation_batch(Path(checkpoint))


def no_reward(completions: list[Any], **_: Any) -> list[float]:
    """The reward of distillation, which needs none."""
    return [0.0] * len(completions)


def _scores_by_itself(trainer_class: type) -> bool:
    """Whether a subclass has its own log-probs."""
    name = "_get_per_token_logps_and_entropies"
    return getattr(trainer_class, name) is not getattr(SteppingTrainer, name)
