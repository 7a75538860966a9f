"""The oracle: SRPO (arXiv 2604.02288) in naive PyTorch with full ``[N, V]`` logits, a function per formula.

Read it to understand the algorithm, call it to check a fast implementation. It favours clarity over speed and
memory, trusts its inputs, computes in fp64 for fp64 hidden states and in fp32 for all others, and is
differentiable by plain autograd. ``gradients`` holds the same derivatives in closed form. A checkout has it as the
package ``reference``, an installation as ``srpo_kernels_reference``.

Symbols, everywhere: z = student logits, y = teacher logits, p = softmax(z), q = softmax(y); logs are natural.
"""

from .objective import SRPOOutput, srpo_loss
from .routing import Routing, group_advantages, route_samples
from .stats import TeacherStats, TokenStats, teacher_stats, token_stats

__all__ = [
    "Routing",
    "SRPOOutput",
    "TeacherStats",
    "TokenStats",
    "group_advantages",
    "route_samples",
    "srpo_loss",
    "teacher_stats",
    "token_stats",
]
