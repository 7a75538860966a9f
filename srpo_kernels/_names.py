"""The public names, which ``srpo_kernels`` hands on when the first of them is used."""

from srpo_kernels.api.fused import fused_loss
from srpo_kernels.api.metrics import summarize_metrics
from srpo_kernels.api.modules import SRPOLoss
from srpo_kernels.api.srpo import srpo_loss
from srpo_kernels.api.statistics import teacher_stats, token_stats, topk_entropy
from srpo_kernels.api.support import pad_support
from srpo_kernels.api.token_losses import policy_loss, sampled_distillation_loss
from srpo_kernels.api.types import FusedOutput, SRPOOutput, TeacherStats, TokenStats
from srpo_kernels.engine.workspace import release as release_workspace
from srpo_kernels.losses.config import SRPOConfig
from srpo_kernels.losses.registry import POLICY_LOSSES, PolicyRows, TokenLoss, register_policy_loss
from srpo_kernels.losses.rollout import RolloutCorrection
from srpo_kernels.losses.rows import ObjectiveRows
from srpo_kernels.losses.terms import PolicyTerms
from srpo_kernels.rollout.data_parallel import call_as_forward, scale_for_gradient_mean
from srpo_kernels.rollout.normalizers import Normalizers
from srpo_kernels.rollout.routing import Routing, group_advantages, route_samples
from srpo_kernels.rows.spec import LogitTransform

__all__ = [
    "POLICY_LOSSES",
    "FusedOutput",
    "LogitTransform",
    "Normalizers",
    "ObjectiveRows",
    "PolicyRows",
    "PolicyTerms",
    "RolloutCorrection",
    "Routing",
    "SRPOConfig",
    "SRPOLoss",
    "SRPOOutput",
    "TeacherStats",
    "TokenLoss",
    "TokenStats",
    "call_as_forward",
    "fused_loss",
    "group_advantages",
    "pad_support",
    "policy_loss",
    "register_policy_loss",
    "release_workspace",
    "route_samples",
    "sampled_distillation_loss",
    "scale_for_gradient_mean",
    "srpo_loss",
    "summarize_metrics",
    "teacher_stats",
    "token_stats",
    "topk_entropy",
]
