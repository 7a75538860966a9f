"""What the micro-batches and ranks of one optimizer step must agree on."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from srpo_kernels.checks import BOOL, FLOATING, INTEGER, require_counts, require_shape, require_tensor
from srpo_kernels.distributed import gather_ranks, require_group
from srpo_kernels.losses.config import UNSET, SRPOConfig, Unset, resolve_options
from srpo_kernels.rows.dtypes import wide_dtype


class Normalizers(NamedTuple):
    """What the micro-batches and ranks of one optimizer step must agree on: scalar tensors, without gradient.

    With those of the whole batch, the losses of its parts add up to the loss of the whole. ``token_count``:
    valid tokens of both branches. ``dw_log_mean``: ``log(mean(exp(-dw_beta * H)))`` over the valid
    distillation tokens, ``H`` the teacher's entropy; 0 without any. ``sdpo_count``: the tokens of that mean;
    ``merge`` needs it. ``sequence_count``: sequences that have a valid token; None where not known. Source:
    SRPO (arXiv 2604.02288), sections 3.2 and 3.3.
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
        dw_beta: float | Unset = UNSET,
        sequence_ids: Tensor | None = None,
        *,
        config: SRPOConfig | None = None,
    ) -> Normalizers:
        """The normalizers of one micro-batch.

        Args:
            mask: ``[B, T]`` or packed ``[N]``, bool: the valid tokens.
            sdpo_mask: ``[B]`` or ``mask``'s shape, bool: the tokens to distill. None: none.
            teacher_entropy: ``mask``'s shape, or the routed entries of its first dimension alone, in order:
                ``[B_sdpo, T]`` (packed: ``[N_sdpo]``). Read at valid distillation tokens only; may be None
                when there are none, or ``dw_beta`` is 0.
            dw_beta: strength of the entropy-aware weight (per nat); >= 0. Unset: ``config.dw_beta``.
            sequence_ids: ``[N]``, integers: the sequence of a packed row. None: ``sequence_count`` is None. A
                sequence must lie in one micro-batch as a whole.
            config: the loss's options, in place of ``dw_beta``. The entropies are those of its logits where
                ``teacher_stats`` got the same ``config``.

        Returns:
            int64 counts and the fp64 log-mean (fp32 on a device without fp64).

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a wrong shape, device or value, no ``teacher_entropy`` where it is needed, or not one of
                ``dw_beta`` and ``config``.
        """
        if config is None and dw_beta is UNSET:
            raise ValueError("dw_beta or config is required, got neither")
        dw_beta = float(resolve_options(config, dw_beta=dw_beta)["dw_beta"])
        require_tensor("mask", mask, BOOL)
        if mask.dim() not in (1, 2):
            raise ValueError(f"mask must have shape [B, T] or [N], got {list(mask.shape)}")
        if sdpo_mask is None:
            sdpo_mask = torch.zeros_like(mask)
        require_tensor("sdpo_mask", sdpo_mask, BOOL, mask.device)
        require_shape("sdpo_mask", sdpo_mask, [mask.shape[:1], mask.shape], "[B], or the shape of mask")

        distilled = mask & (sdpo_mask if sdpo_mask.shape == mask.shape else sdpo_mask[:, None])
        sdpo_count = distilled.sum()
        dtype = wide_dtype(mask.device)
        if teacher_entropy is None:
            if dw_beta > 0 and sdpo_count > 0:
                raise ValueError(f"teacher_entropy is required for valid sdpo tokens, got None with {dw_beta=}")
            log_mean = torch.zeros((), dtype=dtype, device=mask.device)
        else:
            distilled = _distilled_entries(teacher_entropy, sdpo_mask, distilled)
            log_weights = (-dw_beta * teacher_entropy.detach().to(dtype)).masked_fill(~distilled, -math.inf)
            log_sum = log_weights.flatten().logsumexp(0)
            log_mean = (log_sum - sdpo_count.to(dtype).log()).masked_fill(sdpo_count == 0, 0.0)
        return cls(mask.sum(), log_mean, sdpo_count, _count_sequences(mask, sequence_ids))

    def merge(self, *others: Normalizers) -> Normalizers:
        """The normalizers of this and the ``others`` as one batch: exact, whatever the order.

        ``sequence_count`` is None where that of a part is. Raises TypeError for a part that is no
        ``Normalizers``, ValueError for one without ``sdpo_count``.
        """
        for other in others:
            require_normalizers("others", other)
        return _merge_rows(torch.stack([part._to_row() for part in (self, *others)]))

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Normalizers:
        """The normalizers of all ranks of ``group`` as one batch, bit-identical on every rank.

        One collective of four numbers, on the device of the tensors; every rank must join it, one without
        distillation tokens too. None is the default group; without one the result is this process's own.
        Raises ValueError, on every rank, when one has no ``sdpo_count`` or a number that no batch has.
        """
        if group is not None:
            require_group("group", group)
        return _merge_rows(gather_ranks(self._to_row(), group))

    def _to_row(self) -> Tensor:
        """``[4]``, NaN for None."""
        require_normalizers("Normalizers", self)
        dtype = wide_dtype(self.token_count.device)
        unknown = self.dw_log_mean.new_full((), math.nan)
        return torch.stack([(unknown if field is None else field).to(dtype) for field in self])


def require_normalizers(name: str, value: object) -> Normalizers:
    """Raise TypeError or ValueError unless ``value`` is a ``Normalizers`` of scalar tensors; reads no data."""
    if not isinstance(value, Normalizers):
        raise TypeError(f"{name} must be Normalizers, got {type(value).__name__}")
    for field, number in value._asdict().items():
        if number is not None or field not in value._field_defaults:
            # FSDP casts the floating arguments of a forward: half of the digits would be gone.
            exact = (torch.float32, torch.float64)
            require_tensor(f"{name}.{field}", number, exact if field == "dw_log_mean" else (*INTEGER, *exact))
            require_shape(f"{name}.{field}", number, [()], "a scalar")
    return value


def _merge_rows(rows: Tensor) -> Normalizers:
    token_count, log_mean, sdpo_count, sequence_count = rows.unbind(1)
    parts = [dict(zip(Normalizers._fields, row, strict=True)) for row in rows.tolist()]
    if any(math.isnan(part["sdpo_count"]) for part in parts):
        raise ValueError("sdpo_count must be known to merge Normalizers, got None for at least one of them")
    sequences_known = not any(math.isnan(part["sequence_count"]) for part in parts)
    for part in parts:
        require_counts("Normalizers", {k: x for k, x in part.items() if sequences_known or k != "sequence_count"})
    total = sdpo_count.sum()
    log_sum = (sdpo_count.log() + log_mean).logsumexp(0)
    return Normalizers(
        token_count.sum().long(),
        (log_sum - total.log()).masked_fill(total == 0, 0.0),
        total.long(),
        sequence_count.sum().long() if sequences_known else None,
    )


def _distilled_entries(entropy: Tensor, sdpo_mask: Tensor, distilled: Tensor) -> Tensor:
    """``distilled``, or its routed entries alone where ``entropy`` has no others."""
    require_tensor("teacher_entropy", entropy, FLOATING, distilled.device)
    if entropy.shape == distilled.shape:
        return distilled
    routed = distilled[sdpo_mask.any(1) if sdpo_mask.dim() == 2 else sdpo_mask]
    require_shape("teacher_entropy", entropy, [distilled.shape, routed.shape], "all entries, or the routed ones")
    return routed


def _count_sequences(mask: Tensor, sequence_ids: Tensor | None) -> Tensor | None:
    if mask.dim() == 2:
        if sequence_ids is not None:
            raise ValueError(f"sequence_ids is for packed rows: mask must be [N], got {list(mask.shape)}")
        return mask.any(1).sum()
    if sequence_ids is None:
        return None
    require_tensor("sequence_ids", sequence_ids, INTEGER, mask.device)
    require_shape("sequence_ids", sequence_ids, [mask.shape], "the shape of mask")
    return torch.tensor(len(torch.unique(sequence_ids[mask])), device=mask.device)
