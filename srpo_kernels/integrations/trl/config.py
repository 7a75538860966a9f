"""The options of the trainer: those of `GRPOConfig`, and the distillation branch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from trl import GRPOConfig

import srpo_kernels as sk

Method = Literal["srpo", "grpo", "sdpo"]
TeacherKind = Literal["ema", "live"]

# TRL's loss types as a policy loss and a reduction. With "grpo" of importance_sampling_level="sequence" it is "gspo".
_LOSSES: dict[str, tuple[str, str]] = {
    "dapo": ("grpo", "token"),
    "grpo": ("grpo", "sequence"),
    "dr_grpo": ("grpo", "constant"),
    "cispo": ("cispo", "token"),
    "sapo": ("sapo", "sequence"),
    "luspo": ("luspo", "sequence"),
    "vespo": ("vespo", "token"),
}
# The options of a policy loss's own, by TRL's names.
_LOSS_OPTIONS = {
    "sapo": {"tau_positive": "sapo_temperature_pos", "tau_negative": "sapo_temperature_neg"},
    "vespo": {
        "k_positive": "vespo_k_pos",
        "lambda_positive": "vespo_lambda_pos",
        "k_negative": "vespo_k_neg",
        "lambda_negative": "vespo_lambda_neg",
    },
}
_REFUSED_LOSSES = {
    "bnpo": "it divides by the tokens of a micro-batch; 'dapo' divides by those of the optimizer batch",
}
# Options of TRL that need something the fused loss does not have: the one value that is accepted, and why.
_FIXED: dict[str, tuple[Any, str]] = {
    "use_liger_kernel": (False, "it replaces the model's forward, where the loss is computed"),
    "top_entropy_quantile": (1.0, "a mask of high-entropy tokens needs every entropy before the loss"),
    "use_adaptive_entropy": (False, "the controller needs the entropy of every token"),
    "off_policy_mask_threshold": (None, "the trainer does not hand the rollout's log-probs to the loss"),
    "torch_compile": (False, "it is not tested"),
    "parallelism_config": (None, "the loss needs the whole LM head and whole sequences on a device"),
}

_NO_TRANSFORM = sk.LogitTransform()

TEACHER_TEMPLATE = (
    "{prompt}\n\nHere is a correct solution:\n\n{solution}\n\nNow solve the original problem, in your own words."
)


def resolve_loss_type(loss_type: str) -> tuple[str, str]:
    """The policy loss and the reduction of a name of TRL's, or of a registered loss, which is per token.

    Raises ValueError for other names.
    """
    if loss_type in _LOSSES:
        return _LOSSES[loss_type]
    if loss_type in sk.POLICY_LOSSES:
        return loss_type, "token"
    reason = _REFUSED_LOSSES.get(loss_type, "it is unknown")
    names = tuple(dict.fromkeys((*_LOSSES, *sk.POLICY_LOSSES)))
    raise ValueError(f"loss_type must be one of {names}, got {loss_type!r}: {reason}")


@dataclass
class SRPOTrainerConfig(GRPOConfig):
    """`GRPOConfig` and the options of SRPO's distillation branch, with the paper's hyperparameters.

    Defaults that differ from `GRPOConfig`'s, after SRPO (arXiv 2604.02288): ``learning_rate=5e-6``,
    ``epsilon_high=0.28``, ``scale_rewards="none"``, and ``use_bias_correction_kl=False``, the plain k3. The paper's
    batch is ``questions_per_batch=32``. ``loss_type`` keeps TRL's names; its default ``"dapo"`` is the paper's shared
    token denominator.

    Raises:
        ValueError: a bad value, or an option of `GRPOConfig` that the fused loss does not have; both name the option.
    """

    learning_rate: float = 5e-6
    epsilon_high: float | None = 0.28
    scale_rewards: str = "none"
    use_bias_correction_kl: bool = False

    method: str = field(default="srpo", metadata={"help": "srpo, grpo or sdpo."})
    questions_per_batch: int | None = field(default=None, metadata={"help": "Prompts per optimizer step."})
    success_threshold: float = field(default=0.5, metadata={"help": "The least reward of a correct completion."})
    success_reward: str | None = field(default=None, metadata={"help": "The reward function that decides. None: all."})
    distillation_alpha: float = field(default=0.5, metadata={"help": "0: forward KL, 1: reverse KL, else JSD."})
    distillation_mode: str = field(default="full", metadata={"help": "full, topk or sampled."})
    distillation_topk: int = field(default=100, metadata={"help": "Tokens that topk compares."})
    distillation_add_tail: bool = field(default=True, metadata={"help": "One more bucket for the rest of topk."})
    distillation_is_clip: float | None = field(default=2.0, metadata={"help": "Bound of the importance weight."})
    dw_beta: float = field(default=1.0, metadata={"help": "Strength of the entropy-aware weight."})
    dual_clip: float | None = field(default=None, metadata={"help": "Bound of the loss of negative advantages."})
    teacher_model_kind: str = field(default="ema", metadata={"help": "ema or live."})
    teacher_update_rate: float = field(default=0.05, metadata={"help": "Rate of the moving average."})
    teacher_template: str = field(default=TEACHER_TEMPLATE, metadata={"help": "Has {prompt} and {solution}."})
    remove_thinking_from_solution: bool = field(default=False, metadata={"help": "Show no <think>...</think>."})
    max_teacher_length: int | None = field(default=None, metadata={"help": "Bound of teacher prompt and completion."})
    shorten_solution: bool = field(default=False, metadata={"help": "Cut the beginning of a long solution off."})
    workspace_bytes: int | None = field(default=None, metadata={"help": "Bound of the logits alive at a time."})

    def __post_init__(self) -> None:
        if self.questions_per_batch is not None:
            self.gradient_accumulation_steps = self._accumulation_steps(self.questions_per_batch)
        super().__post_init__()
        self._check_own_options()
        self._check_inherited_options()
        self.loss_config()

    def loss_config(self, transform: sk.LogitTransform = _NO_TRANSFORM) -> sk.SRPOConfig:
        """The options of `srpo_loss`, with the logit scale and softcap of a model.

        Raises ValueError for a value that the loss does not take.
        """
        loss_type, reduction = resolve_loss_type(self.loss_type)
        epsilon_low, epsilon_high = self.epsilon, self.epsilon if self.epsilon_high is None else self.epsilon_high
        if self.importance_sampling_level == "sequence" and loss_type == "grpo":
            loss_type = "gspo"
        if loss_type == "cispo":
            # TRL's bound of the ratio is epsilon_high itself, and there is no lower one.
            if not epsilon_high >= 1.0:
                raise ValueError(
                    "epsilon_high must be at least 1.0 with loss_type='cispo', where it is the bound of the ratio "
                    f"itself, such as 5.0; got {epsilon_high!r}"
                )
            epsilon_low, epsilon_high = 1.0, epsilon_high - 1.0
        options: dict[str, Any] = {
            "loss_type": loss_type,
            "epsilon_low": epsilon_low,
            "epsilon_high": epsilon_high,
            "delta": self.delta,
            "dual_clip": self.dual_clip,
            "kl_coef": self.beta,
            "entropy_coef": self.entropy_coef,
            "distillation_mode": self.distillation_mode,
            "topk": self.distillation_topk,
            "add_tail": self.distillation_add_tail,
            "distillation_is_clip": self.distillation_is_clip,
            "dw_beta": self.dw_beta,
            "temperature": self.temperature,
            "logit_scale": transform.logit_scale,
            "softcap": transform.softcap,
            "reduction": reduction,
            "max_length": self.max_completion_length if reduction == "constant" else None,
        }
        own = _LOSS_OPTIONS.get(loss_type, {})
        options["loss_options"] = {ours: getattr(self, theirs) for ours, theirs in own.items()}
        if self.beta != 0.0 and self.use_bias_correction_kl:
            options["kl_type"] = "k3_weighted"
        return sk.SRPOConfig.from_alpha(self.distillation_alpha, **options)

    def _accumulation_steps(self, questions: int) -> int:
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                "questions_per_batch sets gradient_accumulation_steps, which must not be given too, "
                f"got {questions} and {self.gradient_accumulation_steps}"
            )
        # Every launcher sets it; TRL's own world_size is known only after the checks that need the result.
        processes = int(os.environ.get("WORLD_SIZE", "1"))
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
        for name, choices in (("method", get_args(Method)), ("teacher_model_kind", get_args(TeacherKind))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if not 0.0 < self.teacher_update_rate <= 1.0:
            raise ValueError(f"teacher_update_rate must be in (0, 1], got {self.teacher_update_rate!r}")
        try:
            text = self.teacher_template.format(prompt="\0", solution="\1")
        except (IndexError, KeyError, ValueError):
            text = ""
        if "\0" not in text or "\1" not in text:
            raise ValueError(
                "teacher_template must have the fields {prompt} and {solution}, and no other, "
                f"got {self.teacher_template!r}"
            )
        if self.max_teacher_length is not None and self.max_teacher_length <= (self.max_completion_length or 0):
            raise ValueError(
                "max_teacher_length must be more than max_completion_length, for the teacher's prompt to have room, "
                f"got {self.max_teacher_length!r} and {self.max_completion_length!r}"
            )
        if self.method == "sdpo" and (self.beta != 0.0 or self.entropy_coef != 0.0):
            raise ValueError(
                f"beta and entropy_coef are terms of the policy loss, which method='sdpo' has not, "
                f"got {self.beta!r} and {self.entropy_coef!r}"
            )

    def _check_inherited_options(self) -> None:
        for name, (accepted, reason) in _FIXED.items():
            if getattr(self, name) != accepted:
                raise ValueError(f"{name} must be {accepted!r} with SRPOTrainer, got {getattr(self, name)!r}: {reason}")
        loss_type, reduction = resolve_loss_type(self.loss_type)
        levels = {"grpo": ("token", "sequence"), "luspo": ("sequence",)}.get(loss_type, ("token",))
        if self.importance_sampling_level not in levels:
            raise ValueError(
                f"importance_sampling_level must be {' or '.join(map(repr, levels))} with "
                f"loss_type={self.loss_type!r}, got {self.importance_sampling_level!r}"
            )
        if loss_type == "luspo" and self.beta != 0.0:
            raise ValueError(
                f"beta must be 0 with loss_type='luspo', got {self.beta!r}: TRL sums the KL over a sequence, srpo_loss "
                "takes its mean"
            )
        if self.beta != 0.0 and self.use_bias_correction_kl and self.importance_sampling_level == "sequence":
            raise ValueError(
                "use_bias_correction_kl must be False with importance_sampling_level='sequence', got True: TRL weights "
                "the KL by the sequence's ratio, srpo_loss by the token's"
            )
        if loss_type == "vespo" and self.use_vllm and self.vllm_importance_sampling_correction:
            raise ValueError(
                "vllm_importance_sampling_correction must be False with loss_type='vespo', got True: TRL adds it to "
                "the log-ratio of the sequence, srpo_loss multiplies the loss by it"
            )
        if self.entropy_coef != 0.0 and reduction != "token":
            raise ValueError(
                f"entropy_coef must be 0 with loss_type={self.loss_type!r}, got {self.entropy_coef!r}: TRL takes the "
                "bonus per token whatever the loss type, srpo_loss divides it as the loss"
            )
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                "steps_per_generation must be a multiple of gradient_accumulation_steps, got "
                f"{self.steps_per_generation} and {self.gradient_accumulation_steps}: the normalizers of an optimizer "
                "batch are known when it lies in one generation batch"
            )
