"""The token losses of both branches from log-probs that a caller has: for trainers that hand over nothing else."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from srpo_kernels.api.validation import check_config, check_rollout
from srpo_kernels.checks import BOOL, FLOATING, INTEGER, require_shape, require_tensor
from srpo_kernels.losses.config import SRPOConfig
from srpo_kernels.losses.divergence import sampled_divergence
from srpo_kernels.losses.rollout import RolloutCorrection, rollout_weights, without_off_policy_rows
from srpo_kernels.losses.sequences import Sequences
from srpo_kernels.losses.terms import PolicyTerms, distillation_weights, policy_terms

_DEFAULT_CONFIG = SRPOConfig()


def policy_loss(
    log_probs: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    is_weights: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    entropy: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    config: SRPOConfig = _DEFAULT_CONFIG,
) -> PolicyTerms:
    """The policy branch's loss per token, before any reduction, from log-probs in place of hidden states.

    The loss that ``config.loss_type`` names, times ``is_weights``, plus the KL term, minus the entropy bonus. Reads
    the fields of the policy branch alone. Where hidden states are at hand, ``srpo_loss`` is cheaper. Source: SRPO
    (arXiv 2604.02288), section 3.1.

    Args:
        log_probs: ``[B, T]`` or packed ``[N]``, nats; carries gradient.
        advantages: ``[B]`` or ``log_probs``' shape.
        mask: ``log_probs``' shape, bool: the valid tokens; the others are never read. None: all.
        old_log_probs: ``log_probs``' shape. None: the current ones.
        ref_log_probs: ``log_probs``' shape; required when ``kl_coef`` is not 0.
        is_weights: ``log_probs``' shape: a ready correction for a mismatched rollout engine. Detached.
        rollout_log_probs: ``log_probs``' shape: the rollout engine's, for ``config.rollout_correction``.
        entropy: ``log_probs``' shape, nats, when ``entropy_coef`` is not 0 and only then; carries gradient.
        sequence_ids: ``[N]``, integers: the sequence of a packed row; ``gspo`` needs it there.
        config: the options.

    Returns:
        ``loss``, and, without gradient, where the clips hold it (bool), the KL estimates from the old and to the
        reference policy: ``log_probs``' shape each, in fp32 or ``log_probs``' wider dtype, 0 where masked.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device, or a missing argument.
    """
    check_config(config)
    if config.kl_coef != 0.0 and ref_log_probs is None:
        raise ValueError(f"ref_log_probs is required when kl_coef is not 0, got None with kl_coef={config.kl_coef}")
    if (entropy is not None) != (config.entropy_coef != 0.0):
        given = "None" if entropy is None else "a tensor"
        raise ValueError(f"entropy is for an entropy_coef other than 0, got {given} with {config.entropy_coef}")
    rows = _ValidRows.of(log_probs, mask)
    check_rollout(config, rollout_log_probs, old_log_probs)
    needed = config.meets_sequences or sequence_ids is not None
    sequences = rows.sequences(sequence_ids, config) if needed else None
    current, old = rows.take("log_probs", log_probs), rows.take_constant("old_log_probs", old_log_probs)
    values = rows.take("advantages", advantages, or_per_sequence=True).detach()
    weights = rows.take_constant("is_weights", is_weights)
    rollout = rows.take_constant("rollout_log_probs", rollout_log_probs)
    if config.rollout_correction is not None and rollout is not None:
        weights = _corrected(weights, current, old, rollout, sequences, config.rollout_correction, values)
    terms = policy_terms(
        current,
        values,
        config,
        old_log_probs=old,
        ref_log_probs=rows.take_constant("ref_log_probs", ref_log_probs),
        is_weights=weights,
        entropy=None if entropy is None else rows.take("entropy", entropy),
        sequences=sequences,
    )
    return PolicyTerms._make(rows.put(values) for values in terms)


def sampled_distillation_loss(
    log_probs: Tensor,
    teacher_log_probs: Tensor,
    *,
    mask: Tensor | None = None,
    old_log_probs: Tensor | None = None,
    is_weights: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    config: SRPOConfig = _DEFAULT_CONFIG,
) -> Tensor:
    """The distillation branch's loss per token, of ``distillation_mode="sampled"``, from log-probs.

    ``kappa * is_weights * sg(log p - log q) * log p`` at the sampled token: its gradient is that of the reverse KL,
    its value is not one. The entropy-aware weight needs the teacher's whole distribution, and is not in it. Source:
    SRPO (arXiv 2604.02288), section 3.1.

    Args:
        log_probs: ``[B, T]`` or packed ``[N]``, nats; carries gradient.
        teacher_log_probs: ``log_probs``' shape, of the same tokens. Detached.
        mask: ``log_probs``' shape, bool: the valid tokens; the others are never read. None: all.
        old_log_probs: ``log_probs``' shape. None: ``kappa`` is 1.
        is_weights: ``log_probs``' shape. Detached.
        rollout_log_probs: ``log_probs``' shape: the rollout engine's, for ``config.rollout_correction``.
        sequence_ids: ``[N]``, integers: the sequence of a packed row, for a correction of whole sequences.
        config: its ``distillation_is_clip`` bounds ``kappa``.

    Returns:
        ``log_probs``' shape, 0 where masked; dtypes and errors as those of ``policy_loss``.
    """
    check_config(config)
    rows = _ValidRows.of(log_probs, mask)
    check_rollout(config, rollout_log_probs, old_log_probs)
    correction = config.rollout_correction
    needed = (correction is not None and correction.by_sequence) or sequence_ids is not None
    sequences = rows.sequences(sequence_ids, config) if needed else None
    student, teacher = rows.take("log_probs", log_probs), rows.take("teacher_log_probs", teacher_log_probs).detach()
    old = rows.take_constant("old_log_probs", old_log_probs)
    corrections = rows.take_constant("is_weights", is_weights)
    rollout = rows.take_constant("rollout_log_probs", rollout_log_probs)
    if correction is not None and rollout is not None:
        corrections = _corrected(corrections, student, old, rollout, sequences, correction)
    weights = distillation_weights(student, old, corrections, config)
    return rows.put(weights * sampled_divergence(student, teacher))


def _corrected(
    is_weights: Tensor | None,
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    rollout_log_probs: Tensor,
    sequences: Sequences | None,
    correction: RolloutCorrection,
    advantages: Tensor | None = None,
) -> Tensor:
    """The caller's weights times those of the rollout correction; ``advantages`` are policy rows'."""
    log_ratio = log_probs.detach() - rollout_log_probs
    by_old = log_ratio if old_log_probs is None else old_log_probs - rollout_log_probs
    rollout = rollout_weights(by_old, sequences, correction)
    if advantages is not None:
        rollout = without_off_policy_rows(rollout, log_ratio, advantages, sequences, correction)
    return rollout.weights if is_weights is None else rollout.weights * is_weights


class _ValidRows(NamedTuple):
    """The valid rows of ``[B, T]`` or ``[N]``, as indices of the flat tensor; takes and puts values there."""

    rows: Tensor
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, log_probs: Tensor, mask: Tensor | None) -> _ValidRows:
        require_tensor("log_probs", log_probs, FLOATING)
        if log_probs.dim() not in (1, 2):
            raise ValueError(f"log_probs must have shape [B, T] or [N], got {list(log_probs.shape)}")
        if mask is None:
            mask = torch.ones_like(log_probs, dtype=torch.bool)
        require_tensor("mask", mask, BOOL, log_probs.device)
        require_shape("mask", mask, [log_probs.shape], "the shape of log_probs")
        dtype = torch.promote_types(log_probs.dtype, torch.float32)
        return cls(mask.flatten().nonzero().flatten(), log_probs.shape, dtype)

    def take(self, name: str, values: Tensor, *, or_per_sequence: bool = False) -> Tensor:
        require_tensor(name, values, FLOATING, self.rows.device)
        if or_per_sequence:
            require_shape(name, values, [self.shape[:1], self.shape], "[B], or the shape of log_probs")
            values = values if values.shape == self.shape else values[:, None].expand(self.shape)
        require_shape(name, values, [self.shape], "the shape of log_probs")
        return values.flatten()[self.rows].to(self.dtype)

    def take_constant(self, name: str, values: Tensor | None) -> Tensor | None:
        """None for None; without gradient."""
        return None if values is None else self.take(name, values).detach()

    def put(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.shape.numel()).index_put((self.rows,), values).view(self.shape)

    def sequences(self, sequence_ids: Tensor | None, config: SRPOConfig) -> Sequences:
        """The sequence of each valid row, numbered from 0."""
        if len(self.shape) == 2:
            if sequence_ids is not None:
                raise ValueError(f"sequence_ids is for packed rows: log_probs must be [N], got {list(self.shape)}")
            return Sequences(self.rows // max(self.shape[1], 1), max(self.shape[0], 1))
        if sequence_ids is None:
            raise ValueError(
                f"sequence_ids is required for packed rows with loss_type={config.loss_type!r} and "
                f"rollout_correction={config.rollout_correction!r}, got None"
            )
        require_tensor("sequence_ids", sequence_ids, INTEGER, self.rows.device)
        require_shape("sequence_ids", sequence_ids, [self.shape], "the shape of log_probs")
        known, numbers = torch.unique(sequence_ids[self.rows], return_inverse=True)
        return Sequences(numbers, max(len(known), 1))
