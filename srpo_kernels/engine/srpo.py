"""SRPO's objective as the engine runs it: which rows it needs, and what a call says of the whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_kernels.checks import refuse_name
from srpo_kernels.distributed import sum_ranks
from srpo_kernels.engine.arguments import LossArguments, LossOptions
from srpo_kernels.engine.batch import Batch, Needs
from srpo_kernels.engine.order import order_rows
from srpo_kernels.engine.plan import Plan, make_plan
from srpo_kernels.engine.prepare import FlatRows, by_columns, derivation_of, flatten, sequence_lengths
from srpo_kernels.losses.config import SRPOConfig
from srpo_kernels.losses.registry import policy_loss_of
from srpo_kernels.losses.rollout import RolloutCorrection, rollout_weights
from srpo_kernels.losses.sequences import Sequences
from srpo_kernels.losses.srpo import SRPOObjective
from srpo_kernels.rows.dtypes import accumulation_dtype
from srpo_kernels.rows.passes import RowPasses


def prepare_srpo(
    call: LossArguments, config: SRPOConfig, options: LossOptions, needs: Needs, passes: RowPasses
) -> tuple[Batch, Plan, SRPOObjective, bool]:
    """Lay out a call of ``srpo_loss``. Raises ValueError for values that it refuses.

    The last result says whether these are all distillation rows that the given normalizers count.
    """
    policy, correction = policy_loss_of(config.loss_type), config.rollout_correction
    if not config.meets_sequences and config.reduction != "sequence":
        options = options._replace(sequence_parallel_group=None)
    by_sequence = config.meets_sequences or config.counts_sequences
    rows, batch, memory = flatten(
        call, options, passes, by_sequence=by_sequence, needs_advantages=True, taught_support=False
    )
    inputs = dict(batch.inputs)
    if "advantages" not in inputs:
        dtype = accumulation_dtype(call.hidden, call.weight)
        inputs["advantages"] = torch.zeros(len(rows.valid), dtype=dtype, device=rows.valid.device)
    if correction is not None and "old_log_probs" in inputs:
        inputs |= _rollout_inputs(inputs, rows, correction)
    inputs["factors"] = _factors(rows, call, config, inputs["advantages"])
    batch = batch._replace(inputs=inputs)

    moves = moving(rows.valid & ~rows.taught, inputs["advantages"], rows.sequences, config)
    count = 1 if rows.sequences is None else rows.sequences.number
    ids = None if rows.sequences is None else rows.sequences.ids
    order, lengths, numbers = order_rows(rows.valid, rows.taught, moves, ids, count, rows.checks)
    objective = SRPOObjective(
        config,
        _log_mean(call.dw_log_mean, config, inputs["factors"]),
        len(order.taught),
        len(order.alone) + len(order.inactive),
        passes.vocabulary.size,
        derivation_of(call, config, passes.vocabulary),
    )
    plan = make_plan(
        order,
        memory,
        alone_lengths=[len(order.alone)]
        if policy.whole_batch
        else sequence_lengths(lengths[1], rows.sequences if config.whole_sequences else None),
        workspace_bytes=options.workspace_bytes,
        gradients=int(needs.hidden) + int(needs.weight),
        count_inactive=config.count_inactive,
        teacher_first=objective.teacher_first,
        teacher_logits=call.teacher_topk_ids is None,
        columns=by_columns(objective, batch, passes.vocabulary, taught=False),
        # A rank without a policy row takes part where sequences have others elsewhere.
        joins=rows.sequences is not None and rows.sequences.group is not None,
        head_ids=batch.head_ids,
        heads=len(batch.teacher_heads),
    )
    return batch, plan, objective, numbers.get("sdpo_count") == len(order.taught) > 0


def moving(policy: Tensor, advantages: Tensor, sequences: Sequences | None, config: SRPOConfig) -> Tensor | None:
    """Which of the ``policy`` rows ``[N]`` may have a gradient other than 0; None for all.

    A loss of whole sequences decides by the sequence: a token with advantage 0 still moves the ratio of all.
    """
    loss = policy_loss_of(config.loss_type)
    if config.kl_coef != 0.0 or config.entropy_coef != 0.0 or not loss.zero_without_advantage:
        return None
    moves = advantages != 0
    if not config.whole_sequences or sequences is None:
        return moves
    counts = torch.zeros(sequences.number, dtype=torch.int64, device=policy.device)
    counts = sum_ranks(counts.index_add_(0, sequences.ids, (policy & moves).long()), sequences.group)
    return counts[sequences.ids] > 0


def _rollout_inputs(inputs: dict[str, Tensor], rows: FlatRows, correction: RolloutCorrection) -> dict[str, Tensor]:
    """The weights of the rollout correction, ``[N]``, which need no logits where the old log-probs are known."""
    valid = rows.valid.nonzero().squeeze(1)
    log_ratio = inputs["old_log_probs"][valid] - inputs["rollout_log_probs"][valid]
    sequences = None if rows.sequences is None else rows.sequences.select(valid)
    weights, clipped = rollout_weights(log_ratio, sequences, correction)
    spread = torch.zeros_like(inputs["old_log_probs"])
    return {
        "rollout_weights": spread.index_copy(0, valid, weights),
        "rollout_clipped": torch.zeros_like(rows.valid).index_copy(0, valid, clipped),
    }


def _factors(rows: FlatRows, call: LossArguments, config: SRPOConfig, like: Tensor) -> Tensor:
    """Each row's share of the loss, ``[N]``: one over the reduction's denominator.

    Only sequences with a valid row count: rows that are packed without the others could not tell of more.
    """
    ones, valid, sequences = torch.ones_like(like), rows.valid, rows.sequences
    if config.reduction == "token_sum":
        return ones
    if config.reduction == "token":
        return ones / _divisor(valid.sum() if call.token_count is None else call.token_count, ones)
    assert sequences is not None
    lengths = valid.new_zeros(sequences.number, dtype=torch.int64).index_add_(0, sequences.ids, valid.long())
    count = _divisor((lengths > 0).sum() if call.sequence_count is None else call.sequence_count, ones)
    match config.reduction:
        case "sequence_sum":
            return ones / count
        case "constant":
            assert config.max_length is not None
            return ones / (count * config.max_length)
        case "sequence":
            lengths = sum_ranks(lengths, sequences.group).to(ones).clamp_min(1.0)
            return 1.0 / (count * lengths[sequences.ids])
        case unknown:
            refuse_name("reduction", unknown)


def _divisor(count: Tensor, like: Tensor) -> Tensor:
    """A count of valid rows or sequences, which may be a fraction: a mean over ranks; 1 where there are none."""
    count = count.to(like)
    return count.masked_fill(count == 0.0, 1.0)


def _log_mean(log_mean: Tensor | None, config: SRPOConfig, like: Tensor) -> Tensor | None:
    """The log-mean of the entropy weights where it is known: every weight is 1 when ``dw_beta`` is 0."""
    if config.dw_beta == 0.0:
        return like.new_zeros(())
    return None if log_mean is None else log_mean.to(like)
