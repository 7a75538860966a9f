"""SRPO (arXiv 2604.02288) losses from hidden states and the LM head, without the logits."""

from srpo_kernels.config import SRPOConfig
from srpo_kernels.data_parallel import call_as_forward, scale_for_gradient_mean
from srpo_kernels.engine.workspace import release as release_workspace
from srpo_kernels.functional import srpo_loss, teacher_stats, token_stats
from srpo_kernels.metrics import summarize_metrics
from srpo_kernels.modules import SRPOLoss
from srpo_kernels.objective import PolicyTerms
from srpo_kernels.routing import group_advantages, route_samples
from srpo_kernels.token_losses import policy_loss, sampled_distillation_loss
from srpo_kernels.types import Normalizers, Routing, SRPOOutput, TeacherStats, TokenStats

__all__ = [
    "Normalizers",
    "PolicyTerms",
    "Routing",
    "SRPOConfig",
    "SRPOLoss",
    "SRPOOutput",
    "TeacherStats",
    "TokenStats",
    "call_as_forward",
    "group_advantages",
    "policy_loss",
    "release_workspace",
    "route_samples",
    "sampled_distillation_loss",
    "scale_for_gradient_mean",
    "srpo_loss",
    "summarize_metrics",
    "teacher_stats",
    "token_stats",
]
