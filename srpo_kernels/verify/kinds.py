"""What is measured, by name: LM heads, kinds of batches, dtypes and providers; options wait for no torch."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

HeadName = Literal["smollm2-135m", "qwen3-0.6b", "gemma-3-1b", "llama-3-8b", "qwen3-8b", "tiny"]
Workload = Literal["policy", "jsd", "forward_kl", "reverse_kl", "routed"]
# Those of a loss that a user writes, beside ``policy`` and ``jsd``.
OwnWorkload = Literal["ratio_mask", "certainty", "topk_teacher", "support"]
DtypeName = Literal["float32", "bfloat16"]
ProviderName = Literal[
    "bare",
    "srpo_kernels",
    "srpo_kernels-triton",
    "naive",
    "naive-compiled",
    "trl",
    "trl-packed",
    "liger",
    "linear_cross_entropy",
    "cut_cross_entropy",
    "flash-attn",
    "quack",
]
PROVIDERS: tuple[ProviderName, ...] = get_args(ProviderName)
OURS: tuple[ProviderName, ...] = ("srpo_kernels", "srpo_kernels-triton")
# All that compute a loss.
COMPARED: tuple[ProviderName, ...] = tuple(name for name in PROVIDERS if name != "bare")

# Shares of a routed batch: of all sequences, and of the policy sequences.
SDPO_SEQUENCES = 0.4
ZERO_ADVANTAGE = 0.3
# Of the valid rows, those that can move a weight.
ACTIVE_OF_VALID = SDPO_SEQUENCES + (1 - SDPO_SEQUENCES) * (1 - ZERO_ADVANTAGE)
# 35 % padding.
DEFAULT_ACTIVE = 0.65 * ACTIVE_OF_VALID


class Head(NamedTuple):
    """An LM head, and how many positions (``B * T``) are measured on it on a CPU and on a GPU."""

    hidden_size: int
    vocab_size: int
    cpu_rows: int
    gpu_rows: int


HEADS: dict[HeadName, Head] = {
    "smollm2-135m": Head(576, 49_152, 1_024, 32_768),
    "qwen3-0.6b": Head(1_024, 151_936, 512, 16_384),
    "gemma-3-1b": Head(1_152, 262_144, 96, 8_192),
    "llama-3-8b": Head(4_096, 128_256, 64, 8_192),
    "qwen3-8b": Head(4_096, 151_936, 64, 8_192),
    "tiny": Head(32, 500, 128, 128),
}
