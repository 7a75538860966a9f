"""What one SRPO step costs on any hardware: products, memory traffic, launches and workspace, in Triton's interpreter.

Costs are per row of logits and per element of the vocabulary. They are differences between small batches, and hold for
large ones because every term is linear in both.
"""

from __future__ import annotations

from typing import Literal, get_args

CaseName = Literal["policy", "jsd", "forward_kl", "reverse_kl"]
ProviderName = Literal["srpo_kernels", "srpo_kernels-bf16", "trl", "liger", "naive"]
CASES: tuple[CaseName, ...] = get_args(CaseName)
PROVIDERS: tuple[ProviderName, ...] = get_args(ProviderName)
