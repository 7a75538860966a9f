"""The `srpo` section of verl's configuration, and what of verl's own options an `SRPOEngine` cannot honour."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from omegaconf import OmegaConf

import srpo_kernels as sk
from srpo_kernels.integrations.transformers.solutions import (
    FEEDBACK_TEMPLATE,
    SOLUTION_TEMPLATE,
    TEACHER_TEMPLATE,
    check_template,
)
from srpo_kernels.integrations.verl.losses import actor_options, in_verls_words, resolve_loss_mode

Method = Literal["srpo", "grpo", "sdpo"]
TeacherKind = Literal["ema", "live", "frozen"]

# Options of verl that need something an SRPOEngine does not have: what is accepted, and why.
_FIXED: dict[str, tuple[Any, str]] = {
    "trainer.use_v1": (True, "the trainer before it has no queue, from which routing and teacher contexts are read"),
    "actor_rollout_ref.model.use_fused_kernels": (False, "it replaces the model's forward, where the loss is computed"),
    "actor_rollout_ref.model.mtp.enable": (False, "the loss of more predicted tokens is not computed"),
    "actor_rollout_ref.actor.use_prefix_grouper": (False, "it replaces the layout of the batch"),
    "actor_rollout_ref.actor.calculate_entropy": (
        False,
        "actor/entropy is that of the old log-probs, at no price; entropy_coeff has the bonus",
    ),
    "actor_rollout_ref.actor.fsdp_config.qat.enable": (False, "the LM head must be a plain linear layer"),
    "distillation.enabled": (False, "its loss is computed in the place of SRPO's"),
}
_STRATEGIES = ("fsdp", "fsdp2")
_TRAINER_MODES = ("srpo", "sync")


@dataclass
class SRPOOptions:
    """The `srpo` section: routing, distillation and teacher. What is verl's own stays in verl's sections.

    Args:
        method: ``"srpo"`` distills failed rollouts that have a correct sibling, ``"sdpo"`` every rollout that has one,
            ``"grpo"`` none.
        success_threshold: the least score of a correct rollout.
        success_reward: what decides: a key of the reward function's extra information. None: its score.
        feedback: a key of it whose text, where there is one, is shown to the teacher too, and lets a failed rollout
            be distilled that has no correct sibling. None: none.
        distillation_alpha: 0: forward KL, 1: reverse KL, else JSD.
        distillation_mode, distillation_topk, distillation_add_tail, distillation_is_clip, dw_beta: as in `SRPOConfig`.
        teacher_model_kind: ``"ema"``, the moving average; ``"live"``, the weights as they are; ``"frozen"``, those at
            the start.
        teacher_update_rate: of the moving average.
        teacher_template: what the teacher reads, of {prompt}, {solution} and, with ``feedback``, {feedback}.
        solution_template: how {solution} is shown where there is one.
        feedback_template: how {feedback} is shown where there is some.
        remove_thinking_from_solution: show no ``<think>...</think>``.
        max_teacher_length: tokens of the teacher's prompt and a response together, within the model's positions.
            None: the model's positions.
        shorten_solution: cut the beginning of a solution that is too long, in place of showing another, or none.
        teacher_tokens_per_gpu: tokens of one of the teacher's forwards. None: ``actor.ppo_max_token_len_per_gpu``.
        offload_teacher_states: keep the teacher's hidden states on the host until their micro-batch.
        workspace_bytes: bound of the logits that are alive at a time.
        seed: of the draw of the sibling that teaches.

    Raises:
        ValueError: a bad value, by the option's name.
    """

    method: str = "srpo"
    success_threshold: float = 0.5
    success_reward: str | None = None
    feedback: str | None = None
    distillation_alpha: float = 0.5
    distillation_mode: str = "full"
    distillation_topk: int = 100
    distillation_add_tail: bool = True
    distillation_is_clip: float | None = 2.0
    dw_beta: float = 1.0
    teacher_model_kind: str = "ema"
    teacher_update_rate: float = 0.05
    teacher_template: str = TEACHER_TEMPLATE
    solution_template: str = SOLUTION_TEMPLATE
    feedback_template: str = FEEDBACK_TEMPLATE
    remove_thinking_from_solution: bool = False
    max_teacher_length: int | None = None
    shorten_solution: bool = False
    teacher_tokens_per_gpu: int | None = None
    offload_teacher_states: bool = False
    workspace_bytes: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("method", get_args(Method)), ("teacher_model_kind", get_args(TeacherKind))):
            if getattr(self, name) not in choices:
                raise ValueError(f"srpo.{name} must be one of {choices}, got {getattr(self, name)!r}")
        if not 0.0 < self.teacher_update_rate <= 1.0:
            raise ValueError(f"srpo.teacher_update_rate must be in (0, 1], got {self.teacher_update_rate!r}")
        for name in ("max_teacher_length", "teacher_tokens_per_gpu", "workspace_bytes"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ValueError(f"srpo.{name} must be null or at least 1, got {value!r}")
        wanted = ("prompt", "solution") if self.feedback is None else ("prompt", "solution", "feedback")
        check_template("srpo.teacher_template", self.teacher_template, wanted)
        check_template("srpo.solution_template", self.solution_template, ("solution",))
        check_template("srpo.feedback_template", self.feedback_template, ("feedback",))

    @classmethod
    def of(cls, section: Any) -> SRPOOptions:
        """The options of a section. Raises ValueError for a name that is none."""
        given = dict(section or {})
        unknown = given.keys() - {option.name for option in fields(cls)}
        if unknown:
            raise ValueError(f"srpo must have the options of SRPOOptions, {sorted(unknown)} are none")
        return cls(**given)


@dataclass(frozen=True)
class EngineOptions:
    """What an `SRPOEngine` needs to know, beside what verl tells it.

    ``loss`` without the logit transform, which is the model's and the rollout's; ``teacher``: None for no teacher.
    """

    loss: sk.SRPOConfig = field(default_factory=sk.SRPOConfig)
    teacher: TeacherKind | None = None
    teacher_update_rate: float = 0.05
    teacher_tokens: int = 16384
    offload_teacher_states: bool = False
    workspace_bytes: int | None = None


def engine_options(options: SRPOOptions, actor: Any) -> EngineOptions:
    """Those of the `srpo` section and of verl's ``actor`` section.

    Raises ValueError for an option that the loss does not take.
    """
    policy = actor_options(actor)
    try:
        loss = sk.SRPOConfig.from_alpha(
            options.distillation_alpha,
            **policy,
            distillation_mode=options.distillation_mode,
            topk=options.distillation_topk,
            add_tail=options.distillation_add_tail,
            distillation_is_clip=options.distillation_is_clip,
            dw_beta=options.dw_beta,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(in_verls_words(error, policy["loss_type"])) from error
    if options.method == "sdpo" and (loss.kl_coef != 0.0 or loss.entropy_coef != 0.0):
        raise ValueError(
            "actor.use_kl_loss must be false and actor.entropy_coeff 0 with srpo.method=sdpo: they are terms of the "
            f"policy loss, got kl_loss_coef={loss.kl_coef} and entropy_coeff={loss.entropy_coef}"
        )
    kind: Any = None if options.method == "grpo" else options.teacher_model_kind
    return EngineOptions(
        loss=loss,
        teacher=kind,
        teacher_update_rate=0.0 if kind == "frozen" else options.teacher_update_rate,
        teacher_tokens=options.teacher_tokens_per_gpu or actor.ppo_max_token_len_per_gpu,
        offload_teacher_states=options.offload_teacher_states,
        workspace_bytes=options.workspace_bytes,
    )


def check_config(config: Any) -> SRPOOptions:
    """The `srpo` section of verl's whole configuration.

    Raises ValueError for a value of it, or of verl's own options, that cannot be honoured, by the option's name.
    """
    for name, (accepted, reason) in _FIXED.items():
        value = OmegaConf.select(config, name, default=accepted)
        if value != accepted:
            raise ValueError(f"{name} must be {accepted!r} with SRPOTrainer, got {value!r}: {reason}")
    for name, choices in (
        ("actor_rollout_ref.actor.strategy", _STRATEGIES),
        ("actor_rollout_ref.ref.strategy", _STRATEGIES),
        ("trainer.v1.trainer_mode", _TRAINER_MODES),
    ):
        value = OmegaConf.select(config, name, default=choices[0])
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices} with SRPOTrainer, got {value!r}")
    options = SRPOOptions.of(config.get("srpo"))
    engine_options(options, config.actor_rollout_ref.actor)
    _refuse_combinations(config, options)
    return options


def _refuse_combinations(config: Any, options: SRPOOptions) -> None:
    """Raise ValueError for options of different sections that do not go together, by the name of one."""

    def value(name: str) -> Any:
        return OmegaConf.select(config, name)

    if value("actor_rollout_ref.rollout.temperature") <= 0.0:
        raise ValueError(
            "actor_rollout_ref.rollout.temperature must be > 0, by which the logits are divided, got "
            f"{value('actor_rollout_ref.rollout.temperature')!r}"
        )
    mode = value("actor_rollout_ref.actor.policy_loss.loss_mode")
    for section in ("actor", "actor.fsdp_config"):
        name = f"actor_rollout_ref.{section}.ulysses_sequence_parallel_size"
        if sk.POLICY_LOSSES[resolve_loss_mode(mode)].whole_batch and value(name) > 1:
            raise ValueError(
                f"{name} must be 1 with policy_loss.loss_mode={mode!r}, whose means are over a whole micro-batch, got "
                f"{value(name)}"
            )
    weights = value("algorithm.rollout_correction.rollout_is")
    if mode == "geo_mean" and weights == "token":
        raise ValueError(
            "algorithm.rollout_correction.rollout_is must be null or 'sequence' with policy_loss.loss_mode='geo_mean', "
            f"of which verl takes the geometric mean over a sequence, got {weights!r}"
        )
    for name in ("tool_config_path", "function_tool_path"):
        path = value(f"actor_rollout_ref.rollout.multi_turn.{name}")
        if path is not None and options.method != "grpo":
            raise ValueError(
                f"actor_rollout_ref.rollout.multi_turn.{name} must be null with srpo.method={options.method}: the "
                f"teacher's prompt describes no tools, got {path!r}"
            )
