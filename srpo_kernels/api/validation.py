"""Every check of what a caller hands over, and its message: the argument, what came, what was expected.

None reads tensor data: that costs a synchronisation, and the engine does it where it reads the rows anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from srpo_kernels.checks import BOOL, FLOATING, INTEGER, require_shape, require_tensor
from srpo_kernels.distributed import require_group
from srpo_kernels.losses.config import SRPOConfig
from srpo_kernels.losses.registry import POLICY_LOSSES, policy_loss_of
from srpo_kernels.losses.rows import RESERVED
from srpo_kernels.rollout.normalizers import require_normalizers

_BACKENDS = ("auto", "torch", "triton")
_ENGINES = ("auto", "rows", "tile")


def check_backend(backend: str) -> None:
    """The name of a backend."""
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {_BACKENDS}, got {backend!r}")


def check_engine(engine: str) -> None:
    """The name of an engine."""
    if engine not in _ENGINES:
        raise ValueError(f"engine must be one of {_ENGINES}, got {engine!r}")


def check_config(config: object) -> None:
    """An ``SRPOConfig``."""
    if not isinstance(config, SRPOConfig):
        raise TypeError(f"config must be an SRPOConfig, got {type(config).__name__}")


def check_group(group: object, name: str = "vocab_parallel_group") -> None:
    """None, or a process group that this process belongs to."""
    if group is not None:
        require_group(name, group)


def check_workspace(workspace_bytes: object) -> None:
    """None or an int; the engine knows how many bytes a row needs."""
    if workspace_bytes is None:
        return
    if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int):
        raise TypeError(f"workspace_bytes must be an int or None, got {type(workspace_bytes).__name__}")
    if workspace_bytes >= 2**63:
        raise ValueError(f"workspace_bytes must be below 2**63, got an int of {workspace_bytes.bit_length()} bits")


def check_head(
    hidden: object, weight: object, bias: object, names: tuple[str, str, str] = ("hidden", "weight", "bias")
) -> None:
    """Hidden states ``[..., H]``, an LM head ``[V, H]`` and its bias ``[V]`` or None, on one device."""
    hidden = require_tensor(names[0], hidden, FLOATING)
    weight = require_tensor(names[1], weight, FLOATING, hidden.device)
    if hidden.ndim < 2:
        raise ValueError(f"{names[0]} must have shape [..., H] with rows before H, got {list(hidden.shape)}")
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"{names[1]} must have shape [V, H] with V and H at least 1, got {list(weight.shape)}")
    if hidden.shape[-1] != weight.shape[1]:
        hint = ""
        if hidden.shape[-1] == weight.shape[0]:
            hint = f": these are logits in place of {names[0]}, or a transposed {names[1]}"
        raise ValueError(
            f"{names[0]} and {names[1]} must agree in their last dimension, "
            f"got {list(hidden.shape)} and {list(weight.shape)}{hint}"
        )
    if bias is not None:
        bias = require_tensor(names[2], bias, FLOATING, hidden.device)
        require_shape(names[2], bias, [weight.shape[:1]], f"[V] of {names[1]} {list(weight.shape)}")


def check_target_ids(target_ids: object, hidden: Tensor) -> None:
    """Integer ids, one per row of ``hidden``; whether they lie in the vocabulary is for the engine to see."""
    target_ids = require_tensor("target_ids", target_ids, INTEGER, hidden.device)
    require_shape("target_ids", target_ids, [hidden.shape[:-1]], f"the rows of hidden {list(hidden.shape)}")


def check_mask(mask: object, hidden: Tensor, meaning: str = "the shape of target_ids") -> None:
    """None, or bool, one per row of ``hidden``."""
    if mask is not None:
        mask = require_tensor("mask", mask, BOOL, hidden.device)
        require_shape("mask", mask, [hidden.shape[:-1]], meaning)


def check_objective(objective: object, inputs: object) -> None:
    """A function, or the name of a policy loss, and what that reads."""
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs must be a mapping from names to tensors, or None, got {type(inputs).__name__}")
    if not isinstance(objective, str):
        if not callable(objective):
            raise TypeError(f"objective must be a function or the name of a policy loss, got {objective!r}")
        return
    if objective not in POLICY_LOSSES:
        raise ValueError(f"objective must be a function or one of {tuple(POLICY_LOSSES)}, got {objective!r}")
    if "advantages" not in inputs or not set(inputs) <= {"advantages", "old_log_probs"}:
        raise ValueError(
            f"inputs of the policy loss {objective!r} must be 'advantages' and, where they are known, 'old_log_probs', "
            f"got {list(inputs)}"
        )


def check_inputs(inputs: Mapping[str, Any], target_ids: Tensor) -> None:
    """The inputs of an objective: by names of their own, a number per sequence or per row each."""
    rows = target_ids.shape
    if target_ids.ndim not in (1, 2):
        raise ValueError(f"target_ids must have shape [B, T] or [N], got {list(rows)}")
    for name, value in inputs.items():
        if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
            raise ValueError(f"inputs must have names that are identifiers without a leading _, got {name!r}")
        if name in RESERVED:
            raise ValueError(f"inputs must not have the names of what rows have already, got {name!r}")
        value = require_tensor(f"inputs[{name!r}]", value, FLOATING + INTEGER + BOOL, target_ids.device)
        require_shape(f"inputs[{name!r}]", value, [rows[:1], rows], "[B], or the shape of target_ids")
        if value.requires_grad:
            raise ValueError(f"inputs[{name!r}] must not require a gradient: fused_loss gives it none; detach it")


def check_whole_sequences(
    whole_sequences: object, target_ids: Tensor, sequence_ids: object, sequence_parallel_group: ProcessGroup | None
) -> None:
    """What an objective of whole sequences needs, and what only it may have."""
    if not isinstance(whole_sequences, bool):
        raise TypeError(f"whole_sequences must be a bool, got {whole_sequences!r}")
    if sequence_ids is not None:
        if target_ids.ndim != 1:
            raise ValueError(f"sequence_ids is for packed rows: target_ids must be [N], got {list(target_ids.shape)}")
        sequence_ids = require_tensor("sequence_ids", sequence_ids, INTEGER, target_ids.device)
        require_shape("sequence_ids", sequence_ids, [target_ids.shape], "the shape of target_ids")
    if whole_sequences and target_ids.ndim == 1 and sequence_ids is None:
        raise ValueError("sequence_ids is required for packed rows [N] with whole_sequences=True, got None")
    if not whole_sequences and sequence_parallel_group is not None:
        raise ValueError("sequence_parallel_group needs whole_sequences=True: rows of a sequence do not meet otherwise")


def check_loss_rows(
    target_ids: Tensor,
    *,
    advantages: object,
    sdpo_mask: object,
    old_log_probs: object,
    ref_log_probs: object,
    is_weights: object,
    rollout_log_probs: object,
    sequence_ids: object,
) -> None:
    """Everything that ``srpo_loss`` takes per row or per sequence."""
    device, rows = target_ids.device, target_ids.shape
    if target_ids.ndim not in (1, 2):
        raise ValueError(f"target_ids must have shape [B, T] or [N], got {list(rows)}")
    per_sequence, meaning = [rows[:1], rows], "[B], or the shape of target_ids"
    # A column too, in which trainers keep what is the same for a sequence.
    or_column = per_sequence if target_ids.ndim == 1 else [*per_sequence, (rows[0], 1)]
    if advantages is not None:
        require_shape("advantages", require_tensor("advantages", advantages, FLOATING, device), or_column, meaning)
    if sdpo_mask is not None:
        require_shape("sdpo_mask", require_tensor("sdpo_mask", sdpo_mask, BOOL, device), per_sequence, meaning)
    if is_weights is not None:
        require_shape("is_weights", require_tensor("is_weights", is_weights, FLOATING, device), or_column, meaning)
    names = ("old_log_probs", "ref_log_probs", "rollout_log_probs")
    for name, value in zip(names, (old_log_probs, ref_log_probs, rollout_log_probs), strict=True):
        if value is not None:
            require_shape(name, require_tensor(name, value, FLOATING, device), [rows], "the shape of target_ids")
    if sequence_ids is not None:
        if target_ids.ndim != 1:
            raise ValueError(f"sequence_ids is for packed rows: target_ids must be [N], got {list(rows)}")
        sequence_ids = require_tensor("sequence_ids", sequence_ids, INTEGER, device)
        require_shape("sequence_ids", sequence_ids, [rows], "the shape of target_ids")


def check_support_ids(support_ids: object, target_ids: Tensor) -> None:
    """None, or K ids per row; which of them are in the vocabulary is for the engine to see."""
    if support_ids is None:
        return
    support_ids = require_tensor("support_ids", support_ids, INTEGER, target_ids.device)
    if support_ids.shape[:-1] != target_ids.shape or not support_ids.shape[-1:].numel():
        raise ValueError(
            f"support_ids must have shape {[*target_ids.shape, 'K']} with K >= 1, got {list(support_ids.shape)}"
        )


def check_rollout(config: SRPOConfig, rollout_log_probs: object, old_log_probs: object) -> None:
    """What a rollout correction needs, and what only it reads."""
    correction = config.rollout_correction
    if (rollout_log_probs is None) != (correction is None):
        given = "None" if rollout_log_probs is None else "a tensor"
        raise ValueError(
            f"rollout_log_probs is for config.rollout_correction, and needed by it: got {given} with {correction!r}"
        )
    if correction is not None and correction.by_sequence and old_log_probs is None:
        raise ValueError(f"old_log_probs is required with {correction!r}, which compares whole sequences, got None")


def check_options(
    config: SRPOConfig, target_ids: Tensor, old_log_probs: Tensor | None, ref_log_probs: Tensor | None,
    rollout_log_probs: Tensor | None, sequence_ids: Tensor | None, normalizers: object,
    sequence_parallel_group: ProcessGroup | None,
) -> None:  # fmt: skip
    """What the configuration needs from the other arguments."""
    if config.kl_coef != 0.0 and ref_log_probs is None:
        raise ValueError(f"ref_log_probs is required when kl_coef is not 0, got None with kl_coef={config.kl_coef}")
    check_rollout(config, rollout_log_probs, old_log_probs)
    correction = config.rollout_correction
    if (config.meets_sequences or config.counts_sequences) and target_ids.ndim == 1 and sequence_ids is None:
        raise ValueError(
            "sequence_ids is required for packed rows [N] with "
            f"loss_type={config.loss_type!r} and reduction={config.reduction!r}"
            f"{'' if correction is None else f' and {correction!r}'}, got None"
        )
    if sequence_parallel_group is not None and policy_loss_of(config.loss_type).whole_batch:
        raise ValueError(
            f"sequence_parallel_group must be None with loss_type={config.loss_type!r}, whose means are over one call"
        )
    if normalizers is None:
        if sequence_parallel_group is not None:
            raise ValueError("normalizers is required with sequence_parallel_group: a call sees a part of the batch")
        return
    normalizers = require_normalizers("normalizers", normalizers)
    if config.counts_sequences and normalizers.sequence_count is None:
        raise ValueError(f"normalizers.sequence_count is required when reduction={config.reduction!r}, got None")
