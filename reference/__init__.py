"""The oracle: SRPO (arXiv 2604.02288) in naive PyTorch with full ``[N, V]`` logits, a function per formula.

Read it to understand the algorithm, call it to check a fast implementation. It favours clarity over speed and
memory, trusts its inputs, computes in fp64 for fp64 hidden states and in fp32 for all others, and is
differentiable by plain autograd. ``reference.gradients`` holds the same derivatives in closed form.

Symbols, everywhere: z = student logits, y = teacher logits, p = softmax(z), q = softmax(y); logs are natural.
"""

from reference.objective import SRPOOutput, srpo_loss
from reference.routing import Routing, group_advantages, route_samples
from reference.stats import TokenStats, token_stats

__all__ = [
    "Routing",
    "SRPOOutput",
    "TokenStats",
    "group_advantages",
    "route_samples",
    "srpo_loss",
    "token_stats",
]
