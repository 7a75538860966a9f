"""The values that the library's functions return and exchange."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from srpo_kernels.config import require_number
from srpo_kernels.distributed import gather_ranks

METRICS = (
    "policy_loss_sum",
    "policy_tokens",
    "sdpo_loss_sum",
    "sdpo_tokens",
    "active_rows",
    "scored_policy_tokens",
    "clip_low_count",
    "clip_high_count",
    "dual_clip_count",
    "ref_kl_sum",
    "approx_kl_sum",
    "entropy_sum",
    "entropy_tokens",
    "teacher_entropy_sum",
    "dw_weight_sum",
    "dw_weight_sq_sum",
    "divergence_sum",
    "nonfinite_rows",
)


class Routing(NamedTuple):
    """Where each of the ``[B]`` rollouts of a batch goes, and who can teach it.

    ``sdpo_mask``: bool, true for the distillation branch, false for the policy branch. ``teacher_index``: int64, another
    correct rollout of the same group, or -1. ``correct``: bool.
    """

    sdpo_mask: Tensor
    teacher_index: Tensor
    correct: Tensor


class SRPOOutput(NamedTuple):
    """What ``srpo_loss`` returns.

    ``loss``: a scalar that carries gradient. ``metrics``: detached scalar sums and counts, which add up over
    micro-batches and ranks; ``summarize_metrics`` turns them into means. ``log_probs``: of the shape of ``target_ids``,
    detached, in nats, 0 for rows that were not computed.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    log_probs: Tensor


class TokenStats(NamedTuple):
    """What ``token_stats`` returns, each of the shape of ``target_ids``, in nats.

    ``log_probs`` of the targets, ``entropy`` of the student and the student's ``divergence`` from the teacher carry
    gradient; ``teacher_entropy`` does not. The last two are None without a teacher.
    """

    log_probs: Tensor
    entropy: Tensor
    divergence: Tensor | None
    teacher_entropy: Tensor | None


class TeacherStats(NamedTuple):
    """What ``teacher_stats`` returns: ``entropy`` and ``logsumexp`` of each row, in nats, without gradient."""

    entropy: Tensor
    logsumexp: Tensor


class Normalizers(NamedTuple):
    """The two numbers, and their counts, that tie the micro-batches and ranks of one optimizer step together.

    With the ``Normalizers`` of the whole batch, the losses of its parts add up to the loss of the whole. Scalar tensors:

    - ``token_count``: valid tokens of both branches.
    - ``dw_log_mean``: ``log mean exp(-dw_beta H)`` over the valid distillation tokens, ``H`` the teacher's entropy; 0
      when there is none.
    - ``sdpo_count``: how many tokens that mean is over; None where unknown, which ``merge`` refuses.
    - ``sequence_count``: the sequences, fully masked ones of a ``[B, T]`` batch included; None where unknown.

    Source: SRPO (arXiv 2604.02288), sections 3.2 and 3.3.
    """

    token_count: Tensor
    dw_log_mean: Tensor
    sdpo_count: Tensor | None = None
    sequence_count: Tensor | None = None

    @classmethod
    def from_batch(
        cls,
        mask: Tensor,
        sdpo_mask: Tensor | None,
        teacher_entropy: Tensor | None,
        dw_beta: float,
        sequence_ids: Tensor | None = None,
    ) -> Normalizers:
        """The normalizers of one micro-batch.

        ``mask``: ``[B, T]`` or packed ``[N]`` bool, true for valid tokens. ``sdpo_mask``: bool, ``[B]`` or the shape of
        ``mask``; None routes nothing to distillation. ``teacher_entropy``: in nats, the shape of ``mask``, or the
        routed sequences alone, ``[B_sdpo, T]`` (packed: the routed rows, ``[n_sdpo_rows]``); what it holds at other
        than valid distillation tokens is never read. It may be None when nothing is routed or ``dw_beta`` is 0.
        ``dw_beta``: at least 0, per nat. ``sequence_ids``: ``[N]`` integers, for packed rows only, which have no
        ``sequence_count`` without them; a sequence belongs to one micro-batch.

        The counts are int64, the log-mean is float64 (float32 where the device has no float64). No gradient. Raises
        TypeError or ValueError for a wrong type, shape, dtype, device or range.
        """
        require_number("dw_beta", dw_beta, ">= 0", lambda value: value >= 0)
        _check_mask("mask", mask, mask)
        if mask.dim() not in (1, 2):
            raise ValueError(f"mask must have shape [B, T] or [N], got {list(mask.shape)}")
        if sdpo_mask is None:
            sdpo_mask = torch.zeros_like(mask)
        _check_mask("sdpo_mask", sdpo_mask, mask)
        if sdpo_mask.shape not in (mask.shape, mask.shape[:1]):
            raise ValueError(
                f"sdpo_mask must have shape {list(mask.shape[:1])} or that of mask, {list(mask.shape)}, "
                f"got {list(sdpo_mask.shape)}"
            )

        distilled = mask & (sdpo_mask if sdpo_mask.shape == mask.shape else sdpo_mask[:, None])
        sdpo_count = distilled.sum()
        if teacher_entropy is None:
            if dw_beta > 0 and distilled.any():
                raise ValueError(
                    "teacher_entropy must be given when sdpo_mask routes valid tokens and dw_beta > 0"
                )
            log_mean = torch.zeros((), dtype=wide_dtype(mask.device), device=mask.device)
        else:
            distilled = _rows_of_teacher(teacher_entropy, mask, sdpo_mask, distilled)
            log_weights = -dw_beta * teacher_entropy.detach().to(wide_dtype(mask.device))
            log_sum = log_weights.masked_fill(~distilled, -math.inf).flatten().logsumexp(0)
            log_mean = (log_sum - sdpo_count.log()).masked_fill(sdpo_count == 0, 0.0)
        return cls(mask.sum(), log_mean, sdpo_count, _count_sequences(mask, sequence_ids))

    def merge(self, *others: Normalizers) -> Normalizers:
        """The normalizers of this and ``others`` taken as one batch: exact, in any order and grouping.

        Counts add up, and the log-mean is weighted by ``sdpo_count``. ``sequence_count`` is None where a part's is.
        Raises ValueError when a part has no ``sdpo_count``, TypeError when a part is no ``Normalizers``.
        """
        for other in others:
            if not isinstance(other, Normalizers):
                raise TypeError(f"others must be Normalizers, got {type(other).__name__}")
        return _merge_rows(torch.stack([part._to_row() for part in (self, *others)]))

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Normalizers:
        """The normalizers of all ranks of ``group`` taken as one batch, bit-identical on every rank.

        One collective of four numbers per rank, on the device of the tensors, which every rank has to join, also one
        without a distillation token. None is the default group; without one, the result is this rank's own. Raises as
        ``merge`` does, on every rank alike.
        """
        return _merge_rows(gather_ranks(self._to_row(), group))

    def _to_row(self) -> Tensor:
        """``[4]``, NaN for None."""
        dtype = wide_dtype(self.token_count.device)
        unknown = self.dw_log_mean.new_full((), math.nan)
        return torch.stack([(unknown if field is None else field).to(dtype) for field in self])


def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest floating dtype of ``device``."""
    return torch.float32 if device.type == "mps" else torch.float64


def _merge_rows(rows: Tensor) -> Normalizers:
    token_count, log_mean, sdpo_count, sequence_count = rows.unbind(1)
    sdpo_known, sequences_known = rows[:, 2:].isnan().any(0).logical_not().tolist()
    if not sdpo_known:
        raise ValueError("sdpo_count must be known to merge Normalizers, got None for at least one of them")
    total = sdpo_count.sum()
    log_sum = (sdpo_count.log() + log_mean).logsumexp(0)
    return Normalizers(
        token_count.sum().long(),
        (log_sum - total.log()).masked_fill(total == 0, 0.0),
        total.long(),
        sequence_count.sum().long() if sequences_known else None,
    )


def _check_mask(name: str, value: Tensor, mask: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a bool tensor, got {type(value).__name__}")
    if value.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {value.dtype}")
    _check_device(name, value, mask)


def _check_device(name: str, value: Tensor, mask: Tensor) -> None:
    if value.device != mask.device:
        raise ValueError(f"{name} must be on the device of mask, {mask.device}, got {value.device}")


def _rows_of_teacher(entropy: Tensor, mask: Tensor, sdpo_mask: Tensor, distilled: Tensor) -> Tensor:
    """``distilled``, at the rows that ``entropy`` has."""
    if not isinstance(entropy, Tensor):
        raise TypeError(f"teacher_entropy must be a tensor, got {type(entropy).__name__}")
    if not entropy.is_floating_point():
        raise TypeError(f"teacher_entropy must be floating point, got {entropy.dtype}")
    _check_device("teacher_entropy", entropy, mask)
    if entropy.shape == mask.shape:
        return distilled
    routed = distilled[sdpo_mask if sdpo_mask.dim() == 1 else sdpo_mask.any(1)]
    if entropy.shape != routed.shape:
        raise ValueError(
            f"teacher_entropy must have the shape of mask, {list(mask.shape)}, or of its routed part, "
            f"{list(routed.shape)}, got {list(entropy.shape)}"
        )
    return routed


def _count_sequences(mask: Tensor, sequence_ids: Tensor | None) -> Tensor | None:
    if mask.dim() == 2:
        if sequence_ids is not None:
            raise ValueError(
                f"sequence_ids must be None unless mask is packed [N], got mask {list(mask.shape)}"
            )
        return torch.tensor(len(mask), device=mask.device)
    if sequence_ids is None:
        return None
    if not isinstance(sequence_ids, Tensor):
        raise TypeError(f"sequence_ids must be a tensor, got {type(sequence_ids).__name__}")
    if sequence_ids.is_floating_point() or sequence_ids.is_complex() or sequence_ids.dtype == torch.bool:
        raise TypeError(f"sequence_ids must be integers, got {sequence_ids.dtype}")
    if sequence_ids.shape != mask.shape:
        raise ValueError(
            f"sequence_ids must have the shape of mask, {list(mask.shape)}, got {list(sequence_ids.shape)}"
        )
    _check_device("sequence_ids", sequence_ids, mask)
    return torch.tensor(sequence_ids[mask].unique().numel(), device=mask.device)
