"""Checks of a loss's teacher: hidden states and a head, or its likeliest tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from srpo_kernels.api.validation import check_head
from srpo_kernels.checks import BOOL, FLOATING, INTEGER, require_shape, require_tensor
from srpo_kernels.losses.config import SRPOConfig
from srpo_kernels.rows.mixture import has_mixture

# One head of a teacher, or several; None in the place of one is the student's.
Heads = Tensor | Sequence[Tensor | None] | None


def check_teacher(
    teacher_hidden: object,
    teacher_weight: object,
    teacher_bias: object,
    teacher_head_ids: object,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    mask: Tensor | None,
    mask_name: str = "sdpo_mask",
) -> None:
    """The teacher of a loss: no part of it without the mask of its rows, no head without its hidden states."""
    for name, value in (("teacher_hidden", teacher_hidden), ("teacher_weight", teacher_weight)):
        if value is not None and mask is None:
            raise ValueError(f"{name} needs {mask_name}, which says what rows it teaches; got {mask_name}=None")
    if isinstance(teacher_weight, list | tuple):
        _check_teacher_heads(teacher_hidden, teacher_weight, teacher_bias, teacher_head_ids, weight, bias)
        _check_head_ids(teacher_head_ids, target_ids)
    elif teacher_head_ids is not None:
        raise ValueError(
            "teacher_head_ids needs a list of heads as teacher_weight, to say which one a row's is, got "
            f"{type(teacher_weight).__name__}"
        )
    else:
        _check_teacher_head(teacher_hidden, teacher_weight, teacher_bias, weight, bias)


def heads_of(
    teacher_weight: Heads, teacher_bias: Heads, weight: Tensor, bias: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """A teacher's heads as the engine takes them: their weights, and as many biases or none."""
    if teacher_weight is None:
        return [], []
    if isinstance(teacher_weight, Tensor):
        return [teacher_weight], [teacher_bias] if isinstance(teacher_bias, Tensor) else []
    own = [None] * len(teacher_weight) if teacher_bias is None else teacher_bias
    biases = [bias if w is None else b for w, b in zip(teacher_weight, own, strict=True)]
    weights = [weight if w is None else w for w in teacher_weight]
    if all(b is None for b in biases):
        return weights, []
    return weights, [weight.new_zeros(len(weight)) if b is None else b for b in biases]


def check_teacher_mask(teacher_mask: object, teacher: object, target_ids: Tensor) -> None:
    """The rows that have a teacher."""
    rows = target_ids.shape
    if teacher_mask is not None:
        if teacher is None:
            raise ValueError("teacher_mask needs teacher_hidden, or teacher_topk_ids in its place, got None")
        teacher_mask = require_tensor("teacher_mask", teacher_mask, BOOL, target_ids.device)
        require_shape("teacher_mask", teacher_mask, [rows[:1], rows], "[B], or the shape of target_ids")


def check_own_divergences(
    divergence_alpha: object,
    divergence_clip: object,
    target_ids: Tensor,
    divergence: str,
    distillation_mode: str,
    *,
    has_teacher: bool,
) -> None:
    """Numbers of the divergence by row, which the config's divergence must read."""
    rows = target_ids.shape
    for name, value in (("divergence_alpha", divergence_alpha), ("divergence_clip", divergence_clip)):
        if value is None:
            continue
        value = require_tensor(name, value, FLOATING, target_ids.device)
        shapes = [rows[:1], rows] if target_ids.ndim == 1 else [rows[:1], rows, (rows[0], 1)]
        require_shape(name, value, shapes, "[B], or the shape of target_ids")
        if not has_teacher:
            raise ValueError(f"{name} needs a teacher, of whose divergence it is a number")
        if distillation_mode == "sampled":
            raise ValueError(f"{name} must be None with distillation_mode='sampled', which has one token alone")
    if divergence_alpha is not None and not has_mixture(divergence):
        raise ValueError(
            "divergence_alpha needs a config.divergence from a mixture: 'jsd' is forward_kl where it is 0 and "
            f"reverse_kl where it is 1; got {divergence!r}"
        )


def check_stats_teacher(
    teacher_hidden: object,
    teacher_weight: object,
    teacher_bias: object,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> None:
    """The teacher of ``token_stats``: a state for every row of ``hidden``."""
    if isinstance(teacher_weight, list | tuple):
        raise ValueError(
            "teacher_weight must be one head [V, H_t]: token_stats takes no list of several, whose rows can be told "
            f"apart by the mask of a call for each, got a {type(teacher_weight).__name__} of {len(teacher_weight)}"
        )
    _check_teacher_head(teacher_hidden, teacher_weight, teacher_bias, weight, bias)
    if isinstance(teacher_hidden, Tensor):
        rows = hidden.shape[:-1]
        require_shape(
            "teacher_hidden",
            teacher_hidden,
            [rows + teacher_hidden.shape[-1:]],
            "the rows of hidden, and H_t",
        )


def check_teacher_topk(
    ids: object,
    log_probs: object,
    teacher_hidden: object,
    target_ids: Tensor,
    mask: Tensor | None,
    config: SRPOConfig | None,
    mask_name: str = "sdpo_mask",
) -> None:
    """The likeliest tokens of a teacher, in place of its hidden states; a ``config`` of None is that of them."""
    if (ids is None) != (log_probs is None):
        given, other = ("ids", "log_probs") if log_probs is None else ("log_probs", "ids")
        raise ValueError(f"teacher_topk_{given} needs teacher_topk_{other}, got None")
    if ids is None:
        return
    if mask is None:
        raise ValueError(f"teacher_topk_ids needs {mask_name}, which says what rows it teaches; got {mask_name}=None")
    if teacher_hidden is not None:
        raise ValueError("teacher_topk_ids is in place of teacher_hidden: give one of them")
    if config is not None and (config.distillation_mode != "topk" or config.topk_of != "teacher"):
        raise ValueError(
            "teacher_topk_ids needs distillation_mode='topk' and topk_of='teacher', "
            f"got {config.distillation_mode!r} and {config.topk_of!r}"
        )
    ids = require_tensor("teacher_topk_ids", ids, INTEGER, target_ids.device)
    log_probs = require_tensor("teacher_topk_log_probs", log_probs, FLOATING, target_ids.device)
    if ids.ndim != target_ids.ndim + 1 or not ids.shape[-1]:
        raise ValueError(
            f"teacher_topk_ids must have target_ids' dimensions and one of K >= 1 ids, got {list(ids.shape)} for "
            f"target_ids {list(target_ids.shape)}"
        )
    require_shape("teacher_topk_log_probs", log_probs, [ids.shape], "the shape of teacher_topk_ids")


def _check_teacher_heads(
    teacher_hidden: object,
    teacher_weights: Sequence[object],
    teacher_biases: object,
    teacher_head_ids: object,
    weight: Tensor,
    bias: Tensor | None,
) -> None:
    """Several heads: of one vocabulary, for hidden states of one size."""
    if teacher_head_ids is None:
        raise ValueError(
            f"teacher_weight must be a torch.Tensor unless teacher_head_ids says which of several heads a row's is, "
            f"got a {type(teacher_weights).__name__} of {len(teacher_weights)} and teacher_head_ids=None"
        )
    if not teacher_weights:
        raise ValueError("teacher_weight must have one head at least, got an empty list")
    if teacher_biases is None:
        teacher_biases = [None] * len(teacher_weights)
    if not isinstance(teacher_biases, list | tuple) or len(teacher_biases) != len(teacher_weights):
        got = len(teacher_biases) if isinstance(teacher_biases, list | tuple) else type(teacher_biases).__name__
        raise ValueError(
            f"teacher_bias must be a list of {len(teacher_weights)}, a bias or None for each head of teacher_weight, "
            f"got {got}"
        )
    for i, (own_weight, own_bias) in enumerate(zip(teacher_weights, teacher_biases, strict=True)):
        _check_teacher_head(teacher_hidden, own_weight, own_bias, weight, bias, f"[{i}]")


def _check_head_ids(teacher_head_ids: object, target_ids: Tensor) -> None:
    """A head for each row, or entry of the first dimension; which of these, and which heads, the engine sees."""
    ids = require_tensor("teacher_head_ids", teacher_head_ids, INTEGER, target_ids.device)
    rows = target_ids.shape
    if not ids.ndim or ids.shape[1:] not in (rows[1:], rows[:0]):
        raise ValueError(
            f"teacher_head_ids must have shape {list(rows[:1])} or {list(rows)} (a head per entry of the first "
            f"dimension, or per row; of all, or of those with a teacher alone), got {list(ids.shape)}"
        )


def _check_teacher_head(
    teacher_hidden: object,
    teacher_weight: object,
    teacher_bias: object,
    weight: Tensor,
    bias: Tensor | None,
    index: str = "",
) -> None:
    names = (f"teacher_weight{index}", f"teacher_bias{index}")
    if teacher_weight is None and teacher_bias is not None:
        raise ValueError(f"{names[1]} needs {names[0]}: without it the teacher uses weight and bias")
    if teacher_hidden is None:
        if teacher_weight is not None:
            raise ValueError(f"{names[0]} needs teacher_hidden, got None")
        return
    if teacher_weight is None:
        check_head(teacher_hidden, weight, bias, ("teacher_hidden", f"weight (for want of {names[0]})", "bias"))
    else:
        check_head(teacher_hidden, teacher_weight, teacher_bias, ("teacher_hidden", *names))
        teacher_weight = require_tensor(names[0], teacher_weight, FLOATING, weight.device)
        if len(teacher_weight) != len(weight):
            raise ValueError(
                f"{names[0]} and weight must have one vocabulary, got {list(teacher_weight.shape)} "
                f"and {list(weight.shape)}"
            )
    require_tensor("teacher_hidden", teacher_hidden, FLOATING, weight.device)
