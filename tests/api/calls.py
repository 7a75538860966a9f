"""A call of every public function that it takes, with every argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import srpo_kernels as sk
from tests.inputs import cast, head_inputs, loss_inputs

LOSS = cast(loss_inputs(0, (4, 6), teacher_size=5), torch.float32)
PACKED = cast(loss_inputs(0, (24,), teacher_size=5), torch.float32)
STATS = cast(head_inputs(0, (4, 6), 8, 33, teacher_size=5), torch.float32)
TEACHER = {name: STATS[name] for name in ("teacher_hidden", "teacher_weight", "teacher_bias", "mask")}
ROWS = {name: LOSS[name] for name in ("mask", "old_log_probs", "ref_log_probs", "is_weights")}
REWARDS = {"rewards": torch.tensor([0.0, 1.0, 0.5, 0.0]), "group_ids": torch.tensor([0, 0, 1, 1])}
COUNTS = {"mask": LOSS["mask"], "sdpo_mask": LOSS["sdpo_mask"], "teacher_entropy": torch.ones(4, 6)}
# Of no rows in particular: their mean weight is nobody's.
NORMALIZERS = sk.Normalizers.from_batch(**COUNTS, dw_beta=1.0)._replace(sdpo_count=None)
EVERY_TERM = sk.SRPOConfig(kl_coef=0.1, entropy_coef=0.1, rollout_correction=sk.RolloutCorrection.tis())

# Three teachers of one head each.
HEADS = {name: [LOSS[name]] * 3 for name in ("teacher_weight", "teacher_bias")} | {
    "teacher_head_ids": torch.tensor([0, 1, 2, 0])
}
TOKENS = {name: x for name, x in LOSS.items() if name not in ("teacher_hidden", "teacher_weight", "teacher_bias")} | {
    "teacher_topk_ids": torch.zeros(4, 6, 1, dtype=torch.int64),
    "teacher_topk_log_probs": -torch.ones(4, 6, 1),
    "support_ids": torch.zeros(4, 6, 1, dtype=torch.int64),
    "config": sk.SRPOConfig(distillation_mode="topk", topk_of="teacher"),
}


# Numbers of the divergence by row.
OWN = {"divergence_alpha": torch.full((4, 6), 0.5), "divergence_clip": torch.ones(4, 6)}


class Function(NamedTuple):
    """A public function, and a call that it takes."""

    function: Callable[..., Any]
    call: dict[str, Any]


def objective(rows: sk.ObjectiveRows) -> Tensor:
    return rows.divergence - rows.log_probs


# Each row's teacher is its likeliest tokens.
KNOWN = {name: x for name, x in STATS.items() if not name.startswith("teacher")} | {
    name: TOKENS[name] for name in ("teacher_topk_ids", "teacher_topk_log_probs", "support_ids", "config")
}
FUSED = STATS | {"objective": objective, "teacher_mask": torch.ones(4, 6) > 0}
FUSED_PACKED = {name: x.flatten(0, 1) if name.endswith(("hidden", "mask", "ids")) else x for name, x in STATS.items()}

FUNCTIONS = {
    "fused_loss": Function(sk.fused_loss, FUSED),
    "fused_loss, packed": Function(
        sk.fused_loss,
        FUSED_PACKED | {"objective": objective, "sequence_ids": torch.arange(24) // 6, "whole_sequences": True},
    ),
    "fused_loss, some tokens": Function(sk.fused_loss, KNOWN | {"objective": objective}),
    "srpo_loss": Function(
        sk.srpo_loss, LOSS | {"normalizers": NORMALIZERS, "config": EVERY_TERM, "rollout_log_probs": -torch.ones(4, 6)}
    ),
    "srpo_loss, some tokens": Function(sk.srpo_loss, TOKENS),
    "srpo_loss, own divergences": Function(sk.srpo_loss, LOSS | OWN),
    "fused_loss, own divergences": Function(sk.fused_loss, FUSED | OWN),
    "srpo_loss, several teachers": Function(sk.srpo_loss, LOSS | HEADS),
    "fused_loss, several teachers": Function(sk.fused_loss, FUSED | HEADS),
    "srpo_loss, packed": Function(sk.srpo_loss, PACKED | {"config": sk.SRPOConfig(loss_type="gspo")}),
    "token_stats": Function(sk.token_stats, STATS),
    "token_stats, own divergences": Function(sk.token_stats, STATS | OWN),
    "token_stats, some tokens": Function(sk.token_stats, {k: x for k, x in KNOWN.items() if k != "config"}),
    "pad_support": Function(sk.pad_support, {"ids": torch.arange(5), "offsets": torch.tensor([0, 2, 5])}),
    "teacher_stats": Function(sk.teacher_stats, TEACHER),
    "policy_loss": Function(
        sk.policy_loss,
        ROWS
        | {"log_probs": -torch.ones(4, 6), "advantages": torch.ones(4), "entropy": torch.ones(4, 6)}
        | {"rollout_log_probs": -torch.ones(4, 6), "config": EVERY_TERM},
    ),
    "policy_loss, packed": Function(
        sk.policy_loss,
        {"log_probs": -torch.ones(24), "advantages": torch.ones(24), "sequence_ids": torch.arange(24) // 6}
        | {"config": sk.SRPOConfig(loss_type="gspo")},
    ),
    "sampled_distillation_loss": Function(
        sk.sampled_distillation_loss,
        {"log_probs": -torch.ones(4, 6), "teacher_log_probs": -torch.ones(4, 6), "mask": LOSS["mask"]}
        | {"old_log_probs": -torch.ones(4, 6), "is_weights": torch.ones(4, 6)}
        | {"rollout_log_probs": -torch.ones(4, 6), "config": EVERY_TERM},
    ),
    "sampled_distillation_loss, packed": Function(
        sk.sampled_distillation_loss,
        {"log_probs": -torch.ones(24), "teacher_log_probs": -torch.ones(24), "sequence_ids": torch.arange(24) // 6},
    ),
    "route_samples": Function(sk.route_samples, REWARDS | {"feedback_available": torch.ones(4) > 0}),
    "group_advantages": Function(sk.group_advantages, REWARDS),
    "Normalizers.from_batch": Function(sk.Normalizers.from_batch, COUNTS | {"dw_beta": 1.0}),
    "Normalizers.from_batch, packed": Function(
        sk.Normalizers.from_batch,
        {name: x.flatten() for name, x in COUNTS.items() if name != "sdpo_mask"}
        | {"sdpo_mask": torch.ones(24) > 0, "sequence_ids": torch.arange(24) // 6, "dw_beta": 1.0},
    ),
    "Normalizers.all_reduce": Function(sk.Normalizers.from_batch(**COUNTS, dw_beta=1.0).all_reduce, {}),
    "scale_for_gradient_mean": Function(sk.scale_for_gradient_mean, {"loss": torch.tensor(1.0)}),
    "call_as_forward": Function(sk.call_as_forward, {"module": nn.Linear(2, 2), "function": lambda: 1}),
    "SRPOLoss": Function(sk.SRPOLoss, {}),
    "SRPOConfig": Function(sk.SRPOConfig, {}),
}
