"""The options of the trainer: those of `GRPOConfig`, and the distillation branch."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from typing import Literal, get_args

from trl import GRPOConfig

import srpo_kernels as sk
from srpo_kernels.integrations.transformers.solutions import (
    FEEDBACK_TEMPLATE,
    SOLUTION_TEMPLATE,
    TEACHER_TEMPLATE,
    check_template,
)
from srpo_kernels.integrations.trl.losses import TokenDenominator, is_trls, loss_config, reasons_for_log_probs

Method = Literal["srpo", "grpo", "sdpo", "distill"]
TeacherKind = Literal["ema", "live", "frozen", "other"]

_NO_TRANSFORM = sk.LogitTransform()


@dataclass
class SRPOTrainerConfig(GRPOConfig):
    """`GRPOConfig` and the options of SRPO's distillation branch, with the paper's hyperparameters.

    Defaults that differ from `GRPOConfig`'s, after SRPO (arXiv 2604.02288): ``learning_rate=5e-6``,
    ``epsilon_high=0.28``, ``scale_rewards="none"``, and ``use_bias_correction_kl=False``, the plain k3. The paper's
    batch is ``questions_per_batch=32``. ``loss_type`` keeps TRL's names; its default ``"dapo"`` is the paper's shared
    token denominator.

    Raises:
        ValueError: a bad value, or options that contradict each other; it names them.
    """

    learning_rate: float = 5e-6
    epsilon_high: float | None = 0.28
    scale_rewards: str = "none"
    use_bias_correction_kl: bool = False

    method: str = field(default="srpo", metadata={"help": "srpo, grpo, sdpo or distill."})
    questions_per_batch: int | None = field(default=None, metadata={"help": "Prompts per optimizer step."})
    success_threshold: float = field(default=0.5, metadata={"help": "The least reward of a correct completion."})
    success_reward: str | None = field(default=None, metadata={"help": "The reward function that decides. None: all."})
    distillation_alpha: float = field(default=0.5, metadata={"help": "0: forward KL, 1: reverse KL, else JSD."})
    distillation_mode: str = field(default="full", metadata={"help": "full, topk or sampled."})
    distillation_topk: int = field(default=100, metadata={"help": "Tokens that topk compares."})
    distillation_add_tail: bool = field(default=True, metadata={"help": "One more bucket for the rest of topk."})
    distillation_is_clip: float | None = field(default=2.0, metadata={"help": "Bound of the importance weight."})
    dw_beta: float | None = field(default=None, metadata={"help": "Entropy-aware weight. None: 1, 0 with distill."})
    dual_clip: float | None = field(default=None, metadata={"help": "Bound of the loss of negative advantages."})
    teacher_model_kind: str = field(default="ema", metadata={"help": "ema, live, frozen or other."})
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Of another model."})
    teacher_update_rate: float = field(default=0.05, metadata={"help": "Rate of the moving average."})
    teacher_update_every: int = field(default=1, metadata={"help": "Steps from one update of it to the next."})
    teacher_template: str = field(default=TEACHER_TEMPLATE, metadata={"help": "{prompt}, {solution}, {feedback}."})
    solution_template: str = field(default=SOLUTION_TEMPLATE, metadata={"help": "How {solution} is shown."})
    feedback_template: str = field(default=FEEDBACK_TEMPLATE, metadata={"help": "How {feedback} is shown."})
    include_feedback: bool = field(default=False, metadata={"help": "Show privileged_context to the teacher."})
    feedback_only_without_solution: bool = field(default=False, metadata={"help": "Not beside a solution."})
    remove_thinking_from_solution: bool = field(default=False, metadata={"help": "Show no <think>...</think>."})
    max_teacher_length: int | None = field(default=None, metadata={"help": "Bound of teacher prompt and completion."})
    shorten_solution: bool = field(default=False, metadata={"help": "Cut the beginning of a long solution off."})
    token_denominator: str = field(default="step", metadata={"help": "step, or generation_batch as in TRL."})
    log_entropy: bool = field(default=True, metadata={"help": "Log TRL's entropy, for a forward of every row."})
    padding_free: bool = field(default=False, metadata={"help": "Forwards of one row of all tokens, without padding."})
    workspace_bytes: int | None = field(default=None, metadata={"help": "Bound of the logits alive at a time."})

    def __post_init__(self) -> None:
        if self.questions_per_batch is not None:
            self.gradient_accumulation_steps = self._accumulation_steps(self.questions_per_batch)
        super().__post_init__()
        if self.teacher_model_name_or_path is not None or self.method == "distill":
            self.teacher_model_kind = "other" if self.teacher_model_kind == "ema" else self.teacher_model_kind
        if self.dw_beta is None:
            self.dw_beta = 0.0 if self.method == "distill" else 1.0
        # That is of the policy branch.
        self.log_entropy = self.log_entropy and self.method in ("srpo", "grpo")
        self._check_own_options()
        self._check_inherited_options()
        self.loss_config()

    def loss_config(
        self, transform: sk.LogitTransform = _NO_TRANSFORM, *, has_policy: bool | None = None
    ) -> sk.SRPOConfig:
        """The options of `srpo_loss`, with the logit scale and softcap of a model.

        ``has_policy`` says whether the policy branch is in it, or is TRL's own; None is what the options say. Raises
        ValueError for a value that the loss does not take.
        """
        has_policy = not reasons_for_log_probs(self) if has_policy is None else has_policy
        return loss_config(self, transform, has_policy=has_policy)

    def _accumulation_steps(self, questions: int) -> int:
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                "questions_per_batch sets gradient_accumulation_steps, which must not be given too, "
                f"got {questions} and {self.gradient_accumulation_steps}"
            )
        # Every launcher sets it; TRL's own world_size is known only after the checks that need the result.
        parallel = self.parallelism_config
        processes = int(os.environ.get("WORLD_SIZE", "1")) // (1 if parallel is None else parallel.tp_size)
        completions, per_pass = questions * self.num_generations, self.per_device_train_batch_size * processes
        if completions < 1 or completions % per_pass:
            raise ValueError(
                f"questions_per_batch * num_generations must be a positive multiple of per_device_train_batch_size * "
                f"processes, got {questions} * {self.num_generations} and "
                f"{self.per_device_train_batch_size} * {processes}"
            )
        steps: int = completions // per_pass
        return steps

    def _check_own_options(self) -> None:
        choices = {"method": Method, "teacher_model_kind": TeacherKind, "token_denominator": TokenDenominator}
        for name, options in choices.items():
            if getattr(self, name) not in get_args(options):
                raise ValueError(f"{name} must be one of {get_args(options)}, got {getattr(self, name)!r}")
        if not 0.0 < self.teacher_update_rate <= 1.0:
            raise ValueError(f"teacher_update_rate must be in (0, 1], got {self.teacher_update_rate!r}")
        if self.teacher_update_every < 1:
            raise ValueError(f"teacher_update_every must be at least 1, got {self.teacher_update_every!r}")
        fields = ("prompt", "solution", "feedback")
        check_template("teacher_template", self.teacher_template, fields if self.include_feedback else fields[:2])
        check_template("solution_template", self.solution_template, ("solution",))
        check_template("feedback_template", self.feedback_template, ("feedback",))
        if self.max_teacher_length is not None and self.max_teacher_length <= (self.max_completion_length or 0):
            raise ValueError(
                "max_teacher_length must be more than max_completion_length, for the teacher's prompt to have room, "
                f"got {self.max_teacher_length!r} and {self.max_completion_length!r}"
            )
        terms = (self.beta, self.entropy_coef, self.use_adaptive_entropy)
        if self.method in ("sdpo", "distill") and any(terms):
            raise ValueError(
                "beta, entropy_coef and use_adaptive_entropy are terms of the policy loss, which "
                f"method={self.method!r} has not, got {', '.join(map(repr, terms))}"
            )
        if self.method == "distill" and self.teacher_model_kind != "other":
            raise ValueError(
                "teacher_model_kind must be 'other' with method='distill', whose teacher reads what the student reads, "
                f"got {self.teacher_model_kind!r}"
            )

    def _check_inherited_options(self) -> None:
        if self.importance_sampling_level == "sequence" and not is_trls(self.loss_type):
            raise ValueError(
                f"importance_sampling_level must be 'token' with loss_type={self.loss_type!r}, which says itself what "
                "its ratios are, got 'sequence'"
            )
        reasons = reasons_for_log_probs(self)
        if reasons and (self.dual_clip is not None or not is_trls(self.loss_type)):
            raise ValueError(
                f"dual_clip must be None and loss_type one of TRL's with {reasons[0]}, whose loss is TRL's code, got "
                f"{self.dual_clip!r} and {self.loss_type!r}"
            )
        if self.loss_type == "cispo" and "cispo's bound below 1" in reasons:
            warnings.warn(
                "epsilon_high is the bound of the ratio itself with loss_type='cispo', such as 5.0: below 1 it scales "
                "every gradient",
                stacklevel=4,
            )
