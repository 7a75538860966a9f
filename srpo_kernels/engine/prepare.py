"""From the arguments of a call to what the engine works on: flat rows, their order and the plan.

All of it depends on the data, on lengths, routes and advantages, and reads it on the host. It runs within the
operations, so that a compiled graph never sees it.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from srpo_kernels.distributed import gather_rows, group_of, sum_ranks
from srpo_kernels.engine.arguments import NORMALIZERS, LossArguments, LossOptions, StatsArguments, StatsOptions
from srpo_kernels.engine.backends import slice_passes
from srpo_kernels.engine.batch import Batch, Head, Needs
from srpo_kernels.engine.plan import Plan, RowMemory, make_plan, order_rows
from srpo_kernels.engine.row_values import check_row_values, check_teacher_rows, check_workspace
from srpo_kernels.engine.sharded import ShardedPasses, row_passes
from srpo_kernels.engine.stats import StatsCall
from srpo_kernels.engine.vocabulary import Vocabulary
from srpo_kernels.losses.config import SRPOConfig
from srpo_kernels.losses.objective import RowInputs
from srpo_kernels.rows.contract import Divergence, RowPasses, RowSpec
from srpo_kernels.rows.dtypes import accumulation_dtype


def flat_rows(states: Tensor) -> Tensor:
    """Hidden states ``[..., H]`` as ``[N, H]``: a view where strides allow it."""
    return states.reshape(-1, states.shape[-1])


def prepare_loss(
    call: LossArguments,
    config: SRPOConfig,
    options: LossOptions,
    needs: Needs,
    passes: RowPasses,
    vocabulary: Vocabulary,
) -> tuple[Batch, Plan, bool]:
    """Flatten a batch and lay out how it runs. Raises ValueError for values that ``srpo_loss`` refuses.

    The last result says whether these are all distillation rows that the given normalizers count.
    """
    group = None
    if options.sequence_parallel_group is not None and (config.loss_type == "gspo" or config.reduction == "sequence"):
        group = group_of(options.sequence_parallel_group)
    dtype = accumulation_dtype(call.hidden, call.weight)
    memory = RowMemory.of(call.weight, dtype, passes, vocabulary)
    check_workspace(options.workspace_bytes, memory.floor(1 if call.sdpo_mask is None else 2))
    shape, device = call.target_ids.shape, call.target_ids.device
    targets = call.target_ids.reshape(-1).long()
    valid = torch.ones_like(targets, dtype=torch.bool) if call.mask is None else call.mask.reshape(-1)
    routed = torch.zeros_like(valid) if call.sdpo_mask is None else _per_row(call.sdpo_mask, shape)
    advantages = targets.new_zeros(len(targets), dtype=dtype)
    if call.advantages is not None:
        advantages = _per_row(call.advantages.to(dtype), shape)
    numbers = check_row_values(
        targets,
        valid,
        routed,
        vocabulary.size,
        has_teacher=call.teacher_hidden is not None,
        has_advantages=call.advantages is not None,
        **{name: getattr(call, name) for name in NORMALIZERS},
    )
    teacher_rows = torch.arange(len(targets), device=device)
    if call.teacher_hidden is not None and call.sdpo_mask is not None:
        teacher_rows = _teacher_rows(call.teacher_hidden, call.sdpo_mask, call.target_ids)

    sequences, num_sequences = _number_sequences(call.target_ids, call.sequence_ids, valid, config, group)
    batch = Batch(
        hidden=flat_rows(call.hidden),
        head=Head(call.weight, call.bias),
        target_ids=targets,
        inputs=RowInputs(
            advantages,
            _flat(call.old_log_probs, dtype),
            _flat(call.ref_log_probs, dtype),
            _flat(call.is_weights, dtype),
            sequences,
            num_sequences,
            group,
        ),
        factors=_factors(valid, sequences, num_sequences, call, config, dtype, group),
        log_mean=_log_mean(call.dw_log_mean, config, dtype, device),
        teacher_hidden=None if call.teacher_hidden is None else flat_rows(call.teacher_hidden),
        teacher_rows=teacher_rows,
        teacher_head=_teacher_head(call),
    )
    order = order_rows(valid, routed, advantages, sequences, num_sequences, config, group)
    lengths = None
    if config.loss_type == "gspo" and sequences is not None:
        lengths = torch.bincount(sequences[order.policy], minlength=num_sequences).tolist()
        if group is not None:
            # Ranks need each other's sums at one time: all rows are one segment, like those of one long sequence.
            lengths = [sum(lengths)]
    plan = make_plan(
        order,
        lengths,
        config,
        memory=memory,
        vocab_size=vocabulary.size,
        workspace_bytes=options.workspace_bytes,
        gradients=int(needs.hidden) + int(needs.weight),
        log_mean_known=batch.log_mean is not None,
    )
    return batch, plan, numbers.get("sdpo_count") == len(order.distillation) > 0


def tiles(call: StatsArguments, options: StatsOptions, needs: Needs, vocabulary: Vocabulary) -> bool:
    """Whether a call runs without logits: where it has to, or where a row of them does not fit the workspace."""
    if options.engine == "rows" or (options.engine == "auto" and options.workspace_bytes is None):
        return False
    pairs = [(call.hidden, call.weight)]
    if call.teacher_hidden is not None:
        pairs.append((call.teacher_hidden, call.weight if call.teacher_weight is None else call.teacher_weight))
    obstacle = None
    if options.backend != "triton":
        obstacle = f"needs the triton backend, got {options.backend!r}"
    elif any(needs):
        obstacle = "has no gradient: call it under torch.no_grad(), or with tensors that require none"
    elif call.teacher_hidden is not None and options.divergence == "jsd":
        obstacle = "has no jsd, which takes a second look at the logits: ask for 'forward_kl' or 'reverse_kl'"
    elif len({x.dtype for pair in pairs for x in pair}) > 1:
        obstacle = f"needs one dtype for hidden states and weights, got {[x.dtype for pair in pairs for x in pair]}"
    if options.engine == "tile" and obstacle is not None:
        raise ValueError(f"engine='tile' {obstacle}")
    if options.engine == "tile" or obstacle is not None:
        return obstacle is None
    dtype = accumulation_dtype(call.hidden, call.weight)
    memory = RowMemory.of(call.weight, dtype, row_passes("triton", vocabulary), vocabulary)
    return options.workspace_bytes is not None and options.workspace_bytes < memory.floor(len(pairs))


def prepare_stats(
    call: StatsArguments,
    options: StatsOptions,
    vocabulary: Vocabulary,
    *,
    tiled: bool = False,
    check: bool = False,
) -> StatsCall:
    """Flatten a call and find the rows to compute, ``tiled`` or from logits.

    With ``check``, raises ValueError for a target outside the vocabulary in one of them.
    """
    device = call.hidden.device
    passes = row_passes(options.backend, vocabulary)
    if not tiled:
        dtype = accumulation_dtype(call.hidden, call.weight)
        memory = RowMemory.of(call.weight, dtype, passes, vocabulary)
        check_workspace(options.workspace_bytes, memory.floor(1 if call.teacher_hidden is None else 2))
    if call.target_ids is None:
        targets = torch.zeros(call.hidden.shape[:-1], dtype=torch.int64, device=device).view(-1)
    else:
        targets = call.target_ids.reshape(-1).long()
    if call.mask is None:
        rows = torch.arange(len(targets), device=device)
    else:
        rows = call.mask.reshape(-1).nonzero().squeeze(1)
    if check and call.target_ids is not None:
        nowhere = torch.zeros_like(targets, dtype=torch.bool)
        valid = nowhere.index_fill(0, rows, True)
        check_row_values(targets, valid, nowhere, vocabulary.size, has_teacher=True, has_advantages=True)
    return StatsCall(
        target_ids=targets,
        rows=rows,
        spec=RowSpec(
            divergence=None if call.teacher_hidden is None else cast(Divergence, options.divergence),
            alpha=options.alpha,
            temperature=options.temperature,
            logit_scale=options.logit_scale,
            softcap=options.softcap,
        ),
        teacher_hidden=None if call.teacher_hidden is None else flat_rows(call.teacher_hidden),
        teacher_head=_teacher_head(call),
        workspace_bytes=options.workspace_bytes,
        passes=passes,
        keeping=ShardedPasses(slice_passes(options.backend), vocabulary),
        vocabulary=vocabulary,
        tiled=tiled,
    )


def _teacher_head(call: LossArguments | StatsArguments) -> Head:
    """The student's own where the teacher has none."""
    if call.teacher_weight is None:
        return Head(call.weight, call.bias)
    return Head(call.teacher_weight, call.teacher_bias)


def _flat(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if values is None else values.to(dtype).reshape(-1)


def _per_row(values: Tensor, shape: torch.Size) -> Tensor:
    """Values per sequence ``[B]`` or per row, flattened to one per row."""
    return (values if values.shape == shape else values[:, None].expand(shape)).reshape(-1)


def _teacher_rows(teacher_hidden: Tensor, sdpo_mask: Tensor, target_ids: Tensor) -> Tensor:
    """Where each row's teacher state is: at the row itself, or in the routed entries alone."""
    routed = sdpo_mask.flatten(1).any(1) if sdpo_mask.ndim == 2 else sdpo_mask
    rows = torch.arange(target_ids.numel(), device=target_ids.device)
    if teacher_hidden.shape[:-1] == target_ids.shape:
        return rows
    check_teacher_rows(teacher_hidden, target_ids, int(routed.sum()))
    length = target_ids.shape[1] if target_ids.ndim == 2 else 1
    rank = routed.long().cumsum(0) - 1
    return rank.repeat_interleave(length) * length + rows % max(length, 1)


def _number_sequences(
    target_ids: Tensor, sequence_ids: Tensor | None, valid: Tensor, config: SRPOConfig, group: ProcessGroup | None
) -> tuple[Tensor | None, int]:
    """The sequence of every row, numbered from 0, and how many there are, at least 1; None where it is not needed.

    The numbers are the same on all ranks of ``group``.
    """
    if config.loss_type != "gspo" and config.reduction == "token":
        return None, 0
    if sequence_ids is None:
        count, length = target_ids.shape
        sequence_ids = torch.arange(count, device=target_ids.device).repeat_interleave(length)
        if group is None:
            return sequence_ids, max(count, 1)
    known, numbers = torch.unique(sequence_ids[valid].long(), return_inverse=True)
    if group is not None:
        own, known = known, torch.unique(gather_rows(known, group))
        numbers = torch.searchsorted(known, own)[numbers]
    return torch.zeros_like(sequence_ids, dtype=torch.int64).masked_scatter(valid, numbers), max(len(known), 1)


def _factors(
    valid: Tensor,
    sequences: Tensor | None,
    num_sequences: int,
    call: LossArguments,
    config: SRPOConfig,
    dtype: torch.dtype,
    group: ProcessGroup | None,
) -> Tensor:
    """Each row's share of the loss, ``[N]``: one over the reduction's denominator.

    Only sequences with a valid row count: rows that are packed without the others could not tell of more.
    """
    ones = torch.ones_like(valid, dtype=dtype)
    if config.reduction == "token" or sequences is None:
        tokens = valid.sum() if call.token_count is None else call.token_count
        return ones / _divisor(tokens, ones)
    lengths = sequences.new_zeros(num_sequences).index_add_(0, sequences, valid.long())
    count = (lengths > 0).sum() if call.sequence_count is None else call.sequence_count
    count = _divisor(count, ones)
    if config.reduction == "constant" and config.max_length is not None:
        return ones / (count * config.max_length)
    if config.reduction != "sequence":
        raise ValueError(f"reduction={config.reduction!r} is not implemented")
    lengths = sum_ranks(lengths, group).to(ones).clamp_min(1.0)
    return 1.0 / (count * lengths[sequences])


def _divisor(count: Tensor, like: Tensor) -> Tensor:
    """A count of valid rows or sequences, which may be a fraction: a mean over ranks; 1 where there are none."""
    count = count.to(like)
    return count.masked_fill(count == 0.0, 1.0)


def _log_mean(log_mean: Tensor | None, config: SRPOConfig, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """The log-mean of the entropy weights where it is known: every weight is 1 when ``dw_beta`` is 0."""
    if config.dw_beta == 0.0:
        return torch.zeros((), dtype=dtype, device=device)
    return None if log_mean is None else log_mean.to(device, dtype)
