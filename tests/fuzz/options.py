"""The options of a case."""

from __future__ import annotations

from srpo_kernels import SRPOConfig
from srpo_kernels.losses.options import DISTILLATION_MODES, KL_TYPES, LOSS_TYPES, REDUCTIONS
from srpo_kernels.losses.registry import POLICY_LOSSES
from srpo_kernels.rows.spec import DIVERGENCES
from tests.fuzz.case import Draw
from tests.fuzz.own import CLIPS
from tests.strategies import CORRECTIONS, TEACHER_TRANSFORMS, random_loss_options


def draw_config(draw: Draw) -> SRPOConfig:
    """Any combination of options that does not contradict itself."""
    one_of = draw.one_of
    loss_type, reduction = one_of("loss_type", *LOSS_TYPES), one_of("reduction", *REDUCTIONS)
    clipped = "delta" in POLICY_LOSSES[loss_type].fields
    divergence = one_of("divergence", *DIVERGENCES)
    mode = one_of("distillation_mode", "full", *DISTILLATION_MODES)
    # No two clips meet at one ratio: there the derivative is either side's.
    return SRPOConfig(
        loss_type=loss_type,
        loss_options=one_of("loss_options", *random_loss_options(loss_type)),
        epsilon_low=one_of("epsilon_low", 0.2, 3e-4, 0.6),
        epsilon_high=one_of("epsilon_high", 0.28, 4e-4, 0.07),
        delta=one_of("delta", None, 1.4, 1.1, 4.0) if clipped else None,
        dual_clip=one_of("dual_clip", None, 1.25, 3.0) if clipped else None,
        log_ratio_clamp=one_of("log_ratio_clamp", 20.0, 20.0, 0.3, 5.0, None),
        kl_coef=one_of("kl_coef", 0.0, 0.0, 1e-3, 0.1),
        kl_type=one_of("kl_type", *KL_TYPES),
        entropy_coef=one_of("entropy_coef", 0.0, 0.0, 0.01, -0.1),
        divergence=divergence,
        alpha=one_of("alpha", 0.5, 0.5, 0.1, 0.9, 1e-3, 0.999, 1e-6, 1 - 1e-6),
        divergence_clip=None if mode == "sampled" else one_of("divergence_clip", None, None, None, *CLIPS),
        distillation_mode=mode,
        topk=one_of("topk", 1, 2, 5, 20, 100, 1000),
        topk_of=one_of("topk_of", "student", "teacher"),
        add_tail=one_of("add_tail", True, False),
        distillation_is_clip=one_of("distillation_is_clip", 2.0, 1.1, 50.0, None),
        dw_beta=one_of("dw_beta", 1.0, 0.0, 0.3, 2.0, 5.0, 20.0),
        temperature=one_of("temperature", 1.0, 1.0, 0.7, 0.05, 3.0),
        logit_scale=one_of("logit_scale", 1.0, 1.0, 0.5, 4.0),
        softcap=one_of("softcap", None, None, 5.0, 30.0, 1e6),
        teacher_transform=one_of("teacher_transform", None, None, None, *TEACHER_TRANSFORMS),
        reduction=reduction,
        max_length=9 if reduction == "constant" else None,
        count_inactive=one_of("count_inactive", False, True),
        count_entropy=one_of("count_entropy", False, True),
        rollout_correction=one_of("rollout_correction", *[None] * 2 * len(CORRECTIONS), *CORRECTIONS),
    )
