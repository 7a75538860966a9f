"""Liger's chunked GRPO for the policy rows and its chunked JSD for the distillation rows.

The JSD is a mean over tokens that all weigh the same: the entropy-aware and importance weights of SRPO cannot be given.
"""

from __future__ import annotations

import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss, LigerFusedLinearJSDLoss
from torch import Tensor

from srpo_kernels.verify.batches import Batch
from srpo_kernels.verify.providers import Step, Unsupported, autograd_step
from srpo_kernels.verify.providers.naive_compiled import require_compiler

_BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0}


def loss(batch: Batch) -> tuple[Tensor, None]:
    terms, config = [], batch.config
    policy = ~batch.sdpo_mask
    if policy.any():
        # "bnpo" is the mean over the valid tokens of the call.
        grpo = LigerFusedLinearGRPOLoss(
            beta=0.0,
            use_ref_model=False,
            epsilon_low=config.epsilon_low,
            epsilon_high=config.epsilon_high,
            loss_type="bnpo",
        )
        mask = batch.mask[policy]
        mean, _ = grpo(
            batch.hidden[policy],
            batch.weight,
            batch.target_ids[policy],
            mask,
            batch.advantages[policy],
            old_per_token_logps=batch.old_log_probs[policy],
        )
        terms.append(mean * mask.sum())
    rows = batch.sdpo_rows
    if batch.distills:
        beta = _BETAS.get(config.divergence, config.alpha)
        jsd = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)
        mean = jsd(
            batch.hidden[rows],
            batch.weight,
            batch.teacher_hidden[rows],
            batch.weight.detach(),
            batch.target_ids[rows],
        )
        terms.append(mean * rows.sum())
    return torch.stack(terms).sum() / batch.mask.sum(), None


def prepare(batch: Batch) -> Step:
    require_compiler(batch)
    if batch.config.softcap is not None:
        raise Unsupported("no softcap in these losses")
    torch._dynamo.reset()
    return autograd_step(loss, batch)
