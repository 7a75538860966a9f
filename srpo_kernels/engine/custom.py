"""A caller's objective as the engine runs it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from srpo_kernels.engine.arguments import LossArguments, LossOptions
from srpo_kernels.engine.batch import Batch, Needs
from srpo_kernels.engine.objectives import CustomObjective
from srpo_kernels.engine.order import order_rows
from srpo_kernels.engine.plan import Plan, make_plan
from srpo_kernels.engine.prepare import by_columns, derivation_of, flatten, sequence_lengths
from srpo_kernels.losses.config import SRPOConfig
from srpo_kernels.losses.registry import PolicyRows, policy_loss_of
from srpo_kernels.losses.rows import ObjectiveRows
from srpo_kernels.rows.dtypes import accumulation_dtype
from srpo_kernels.rows.passes import RowPasses


def prepare_custom(
    call: LossArguments, config: SRPOConfig, options: LossOptions, needs: Needs, passes: RowPasses
) -> tuple[Batch, Plan, CustomObjective]:
    """Lay out a call of ``fused_loss``."""
    whole = options.whole_sequences
    rows, batch, memory = flatten(call, options, passes, by_sequence=whole, needs_advantages=False, taught_support=True)
    function: Callable[[ObjectiveRows], Tensor]
    if isinstance(options.objective, str):
        function, name = partial(_registered, config, options.objective), f"the policy loss {options.objective!r}"
    else:
        function, name = options.objective, getattr(options.objective, "__qualname__", repr(options.objective))
    objective = CustomObjective(
        function,
        name,
        derivation_of(call, config, passes.vocabulary),
        whole_sequences=whole,
        has_teacher=call.teacher_mask is not None,
    )
    whole_batch = isinstance(options.objective, str) and policy_loss_of(options.objective).whole_batch
    count = 1 if rows.sequences is None else rows.sequences.number
    ids = None if rows.sequences is None else rows.sequences.ids
    order, lengths, _ = order_rows(rows.valid, rows.taught, None, ids, count, rows.checks)
    first = torch.cat(order)[:1]
    if len(first):
        like = call.hidden.new_empty((), dtype=accumulation_dtype(call.hidden, call.weight))
        objective.discover({key: batch.inputs[key][first] for key in options.input_names}, like)
    grouped = rows.sequences is not None and rows.sequences.group is not None
    plan = make_plan(
        order,
        memory,
        taught_lengths=[len(order.taught)] if whole_batch else sequence_lengths(lengths[0], rows.sequences),
        alone_lengths=[len(order.alone)] if whole_batch else sequence_lengths(lengths[1], rows.sequences),
        workspace_bytes=options.workspace_bytes,
        gradients=int(needs.hidden) + int(needs.weight),
        teacher_logits=call.teacher_topk_ids is None,
        columns=by_columns(objective, batch, passes.vocabulary, taught=False),
        taught_columns=by_columns(objective, batch, passes.vocabulary, taught=True),
        joins=grouped,
        head_ids=batch.head_ids,
        heads=len(batch.teacher_heads),
    )
    return batch, plan, objective


def _registered(config: SRPOConfig, name: str, rows: ObjectiveRows) -> Tensor:
    """A registered policy loss of ``rows.advantages`` and, where they are given, ``rows.old_log_probs``."""
    loss = policy_loss_of(name)
    inputs = rows.select_inputs(slice(None))
    own = config if config.loss_type == name else SRPOConfig(loss_type=name)
    sequences = rows.whole_sequences if loss.whole_sequences else None
    policy_rows = PolicyRows.of(
        rows.log_probs, inputs.get("old_log_probs"), rows.advantages, sequences, config.log_ratio_clamp
    )
    return loss(policy_rows, own.policy_options()).loss
