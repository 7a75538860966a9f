"""TRL's functions that can be called alone."""

from __future__ import annotations

from torch import Tensor

import srpo_kernels as sk
from tools.peers.batches import Batch, Comparison, token_losses


def comparisons() -> list[Comparison]:
    """VESPO's weights and the mask of off-policy sequences. The trainer's own losses: tests/integrations."""
    from trl import GRPOTrainer

    def vespo(batch: Batch, log_probs: Tensor) -> Tensor:
        weights = GRPOTrainer.get_gamma_weights(
            batch.advantages[:, None], log_probs - batch.old_log_probs, batch.mask.float(), None
        )
        loss: Tensor = -weights * batch.advantages[:, None] * log_probs * batch.mask
        return loss

    def off_policy(batch: Batch, log_probs: Tensor) -> Tensor:
        kept: Tensor = GRPOTrainer.get_off_policy_mask(
            batch.advantages[:, None], log_probs, batch.other_log_probs, batch.mask.float(), 0.05
        )
        return -batch.advantages[:, None] * log_probs * kept * batch.mask

    def our_off_policy(batch: Batch, log_probs: Tensor) -> Tensor:
        correction = sk.RolloutCorrection(level=None, off_policy_threshold=0.05)
        config = sk.SRPOConfig(loss_type="reinforce", rollout_correction=correction)
        return sk.policy_loss(
            log_probs, batch.advantages, mask=batch.mask, rollout_log_probs=batch.other_log_probs, config=config
        ).loss

    return [
        Comparison(
            "TRL", "get_gamma_weights", "vespo", vespo,
            lambda batch, log_probs: token_losses(sk.SRPOConfig(loss_type="vespo"), batch, log_probs),
        ),
        Comparison("TRL", "get_off_policy_mask", "off_policy_threshold", off_policy, our_off_policy),
    ]  # fmt: skip
