"""From the arguments of a call to what the engine works on: flat rows, their order and the plan.

All of it depends on the data, on lengths, routes and advantages, and reads it on the host. It runs within the
operations, so that a compiled graph never sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from srpo_kernels.distributed import gather_rows, group_of
from srpo_kernels.engine import columns
from srpo_kernels.engine.arguments import NORMALIZERS, LossArguments, LossOptions, StatsArguments
from srpo_kernels.engine.batch import Batch, Head
from srpo_kernels.engine.memory import RowMemory
from srpo_kernels.engine.objectives import Objective
from srpo_kernels.engine.row_values import (
    RowChecks,
    check_head_ids,
    check_own_divergences,
    check_support,
    check_teacher_head_ids,
    check_teacher_rows,
    check_workspace,
)
from srpo_kernels.losses.config import SRPOConfig
from srpo_kernels.losses.derived import Derivation
from srpo_kernels.losses.rows import POSITION
from srpo_kernels.losses.sequences import Sequences
from srpo_kernels.rows.contract import Support
from srpo_kernels.rows.dtypes import accumulation_dtype
from srpo_kernels.rows.passes import RowPasses
from srpo_kernels.rows.spec import LOWEST, RowSpec
from srpo_kernels.rows.vocabulary import Vocabulary


def flat_rows(states: Tensor) -> Tensor:
    """Hidden states ``[..., H]`` as ``[N, H]``: a view where strides allow it."""
    return states.reshape(-1, states.shape[-1])


class FlatRows(NamedTuple):
    """The rows of a call of the loss, ``[N]`` each, and the checks of its values, which the host has not read yet."""

    valid: Tensor
    taught: Tensor
    sequences: Sequences | None
    checks: RowChecks


def flatten(
    call: LossArguments,
    options: LossOptions,
    passes: RowPasses,
    *,
    by_sequence: bool,
    needs_advantages: bool,
    taught_support: bool,
) -> tuple[FlatRows, Batch, RowMemory]:
    """Flatten a batch. Raises ValueError for values that no loss takes.

    ``by_sequence``: rows of a sequence matter to each other, those of other ranks too. ``taught_support``: what rows
    with a teacher were sampled from matters too.
    """
    dtype, vocabulary = accumulation_dtype(call.hidden, call.weight), passes.vocabulary
    memory = RowMemory.of(call.weight, dtype, passes)
    check_workspace(options.workspace_bytes, memory.floor(1 if call.teacher_mask is None else 2))
    shape = call.target_ids.shape
    targets = call.target_ids.reshape(-1).long()
    valid = torch.ones_like(targets, dtype=torch.bool) if call.mask is None else call.mask.reshape(-1)
    taught = torch.zeros_like(valid) if call.teacher_mask is None else per_row(call.teacher_mask, shape)
    inputs = {
        name: per_row(values.to(dtype) if values.is_floating_point() else values, shape)
        for name, values in zip(options.input_names, call.inputs, strict=True)
    }
    teacher = call.teacher_hidden if call.teacher_topk_ids is None else call.teacher_topk_ids
    checks = RowChecks.of(
        targets,
        valid,
        taught,
        vocabulary.size,
        has_teacher=teacher is not None,
        has_advantages="advantages" in inputs or not needs_advantages,
        **{name: getattr(call, name) for name in NORMALIZERS},
    )
    config = SRPOConfig.decode(options.config)
    own = inputs.get("divergence_alpha"), inputs.get("divergence_clip")
    check_own_divergences(*own, valid & taught, config.divergence)
    teacher_rows = torch.arange(len(targets), device=targets.device)
    if teacher is not None and call.teacher_mask is not None:
        teacher_rows = _teacher_rows(teacher, call.teacher_mask, call.target_ids)
    support = None
    if call.teacher_topk_ids is not None and call.teacher_topk_log_probs is not None:
        support = support_of(call.teacher_topk_ids, call.teacher_topk_log_probs.to(dtype))
        check_support("teacher_topk_ids", support.ids[teacher_rows[valid & taught]], vocabulary.size)
    support_ids = None if call.support_ids is None else flat_rows(call.support_ids).long()
    if support_ids is not None:
        check_support("support_ids", support_ids[valid if taught_support else valid & ~taught], vocabulary.size)
        inputs[POSITION] = position_in(support_ids, targets)
    sequences = None
    if by_sequence:
        name = options.sequence_parallel_group
        group = None if name is None else group_of(name)
        sequences = _number_sequences(call.target_ids, call.sequence_ids, valid, group)
    batch = Batch(
        flat_rows(call.hidden),
        Head(call.weight, call.bias),
        targets,
        inputs,
        sequences,
        None if call.teacher_hidden is None else flat_rows(call.teacher_hidden),
        teacher_rows,
        _teacher_heads(call),
        _head_ids(call, valid & taught),
        support,
        support_ids,
    )
    return FlatRows(valid, taught, sequences, checks), batch, memory


def position_in(support_ids: Tensor, target_ids: Tensor) -> Tensor:
    """Where in its support ``[N, S]`` each row's own token is, -1 where it is not; ``[N]``."""
    same = support_ids == target_ids[:, None]
    return same.int().argmax(1).masked_fill(~same.any(1), -1)


def derivation_of(call: LossArguments | StatsArguments, config: SRPOConfig, vocabulary: Vocabulary) -> Derivation:
    """How the statistics of a call are made."""
    given = None if call.teacher_topk_ids is None else call.teacher_topk_ids.shape[-1]
    return Derivation.of(config, given, vocabulary.size, has_support=call.support_ids is not None)


def by_columns(objective: Objective, batch: Batch, vocabulary: Vocabulary, *, taught: bool) -> bool:
    """Whether rows with a teacher, or without one, run by columns of the head: where that suffices and costs less."""
    if batch.support_ids is None or not objective.by_columns(taught):
        return False
    tokens = batch.support_ids.shape[1]
    if batch.teacher_support is not None and "support_log_probs" in objective.reads(taught)[0]:
        tokens += batch.teacher_support.ids.shape[1]
    return columns.cheaper(tokens, vocabulary.size)


def sequence_lengths(lengths: list[int], sequences: Sequences | None) -> list[int] | None:
    """How many rows of a kind each sequence has; None where sequences do not matter."""
    if sequences is None:
        return None
    # Ranks need each other's sums at one time: all rows are one segment, like those of one long sequence.
    return lengths if sequences.group is None else [sum(lengths)]


def row_spec(
    call: LossArguments | StatsArguments,
    config: SRPOConfig,
    vocabulary: Vocabulary,
    names: frozenset[str] | None = None,
) -> RowSpec:
    """What is computed of rows; without the divergence or the top-k where ``names``, what is wanted, have none."""
    given = call.teacher_topk_ids
    topk = min(config.topk if given is None else given.shape[-1], vocabulary.size)
    return RowSpec(
        config.transform,
        config.divergence if names is None or "divergence" in names else None,
        config.alpha,
        topk if names is None or "support_log_probs" in names else 0,
        config.add_tail and topk < vocabulary.size,
        config.topk_of,
        config.divergence_clip,
        own_teacher=config.own_teacher_transform,
    )


def _teacher_heads(call: LossArguments) -> list[Head]:
    """The student's own where the teacher has none."""
    if not call.teacher_weights:
        return [Head(call.weight, call.bias)]
    biases: Sequence[Tensor | None] = call.teacher_biases or [None] * len(call.teacher_weights)
    return [Head(weight, bias) for weight, bias in zip(call.teacher_weights, biases, strict=True)]


def _head_ids(call: LossArguments, taught: Tensor) -> Tensor | None:
    """The teacher head of each of the ``taught`` rows ``[N]``, 0 in others; None where there is one head alone."""
    ids, shape = call.teacher_head_ids, call.target_ids.shape
    if ids is None or call.teacher_mask is None:
        return None
    rows = taught.nonzero().squeeze(1)
    places, entries = rows, shape[0]
    if len(ids) != entries:
        routed = _routed(call.teacher_mask)
        check_teacher_head_ids(ids, entries, int(routed.sum()))
        places = _places(routed, call.target_ids)[rows]
    own = per_row(ids.long(), torch.Size((len(ids), *shape[1:])))[places]
    check_head_ids(own, len(call.teacher_weights))
    return torch.zeros_like(taught, dtype=torch.int64).index_copy_(0, rows, own)


def per_row(values: Tensor, shape: torch.Size) -> Tensor:
    """Values per sequence ``[B]``, ``[B, 1]`` or per row, flattened to one per row."""
    return (values if values.shape == shape else values.reshape(shape[0], 1).expand(shape)).reshape(-1)


def support_of(ids: Tensor, log_probs: Tensor) -> Support:
    """A teacher's likeliest tokens, flattened; those that are not there have no probability."""
    ids = flat_rows(ids).long()
    return Support(ids, flat_rows(log_probs).clamp_min(LOWEST).masked_fill(ids < 0, LOWEST))


def _teacher_rows(teacher_hidden: Tensor, teacher_mask: Tensor, target_ids: Tensor) -> Tensor:
    """Where each row's teacher state is: at the row itself, or in the routed entries alone."""
    if teacher_hidden.shape[:-1] == target_ids.shape:
        return torch.arange(target_ids.numel(), device=target_ids.device)
    routed = _routed(teacher_mask)
    check_teacher_rows(teacher_hidden, target_ids, int(routed.sum()))
    return _places(routed, target_ids)


def _routed(teacher_mask: Tensor) -> Tensor:
    """Which entries of the first dimension have a row with a teacher, ``[B]``."""
    return teacher_mask.flatten(1).any(1) if teacher_mask.ndim == 2 else teacher_mask


def _places(routed: Tensor, target_ids: Tensor) -> Tensor:
    """Where each row is among those of the ``routed`` entries alone, ``[N]``; of no use for the other rows."""
    length = target_ids.shape[1] if target_ids.ndim == 2 else 1
    rows = torch.arange(target_ids.numel(), device=target_ids.device)
    rank = routed.long().cumsum(0) - 1
    return rank.repeat_interleave(length) * length + rows % max(length, 1)


def _number_sequences(
    target_ids: Tensor, sequence_ids: Tensor | None, valid: Tensor, group: ProcessGroup | None
) -> Sequences:
    """The sequence of every row, numbered from 0, and how many there are, at least 1: the same on all ranks."""
    if sequence_ids is None:
        count, length = target_ids.shape
        sequence_ids = torch.arange(count, device=target_ids.device).repeat_interleave(length)
        if group is None:
            return Sequences(sequence_ids, max(count, 1))
    known, numbers = torch.unique(sequence_ids[valid].long(), return_inverse=True)
    if group is not None:
        own, known = known, torch.unique(gather_rows(known, group))
        numbers = torch.searchsorted(known, own)[numbers]
    ids = torch.zeros_like(sequence_ids, dtype=torch.int64).masked_scatter(valid, numbers)
    return Sequences(ids, max(len(known), 1), group)
