"""The teacher's forwards: hidden states and entropies of the routed responses of a mini-batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor, nn
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id

import srpo_kernels as sk
from srpo_kernels.integrations.transformers import head_operands
from srpo_kernels.integrations.transformers.hidden import evaluating, lm_head, peft_model
from srpo_kernels.integrations.verl.rows import ResponseRows


class TaughtRows(NamedTuple):
    """What the teacher says of the routed responses of a mini-batch, by their place in it.

    ``hidden``: ``[T, H]``, on the device or the host; ``entropies``: ``[T]``; ``weight`` and ``bias``: of the teacher's
    head, None where it is the student's.
    """

    hidden: dict[int, Tensor]
    entropies: dict[int, Tensor]
    weight: Tensor | None = None
    bias: Tensor | None = None

    def hidden_of(self, order: Sequence[int], device: Any) -> Tensor | None:
        """The states of the routed sequences among these, one after the other; None where there are none."""
        states = [self.hidden[row].to(device) for row in order if row in self.hidden]
        return torch.cat(states) if states else None

    def all_entropies(self, device: Any) -> Tensor | None:
        """Those of all routed sequences, in order; None where no weight needs them."""
        if self.entropies:
            return torch.cat([self.entropies[row] for row in sorted(self.entropies)])
        return None if self.hidden else torch.zeros(0, device=device)


def teacher_pass(engine: Any, data: TensorDict, config: sk.SRPOConfig) -> TaughtRows:
    """The teacher's forwards of a mini-batch, without gradient and dropout, of its routed sequences alone.

    ``engine``: an `SRPOEngine`, whose ``options`` bound the tokens of a forward. Every rank makes as many forwards as
    the one with most, since each is a collective.
    """
    options = engine.options
    routed = data["sdpo_mask"].nonzero().flatten().tolist()
    contexts, responses = data["teacher_input_ids"].unbind(), data["responses"].unbind()
    budget = options.teacher_tokens * engine.ulysses_sequence_parallel_size
    groups = within_budget({row: len(contexts[row]) for row in routed}, budget, packed=engine.use_remove_padding)
    count = torch.tensor(len(groups), device=get_device_id())
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    averaged = engine.average is not None
    # LoRA elsewhere leaves the head as it is.
    own_head = averaged and (peft_model(engine.module) is None or any(lm_head(engine.base).children()))
    taught = TaughtRows({}, {})

    def read(rows: ResponseRows, hidden: Tensor, head: nn.Module) -> tuple[ResponseRows, Any, Any, Any, Any]:
        operands = head_operands(hidden, head)
        entropy = None
        if config.dw_beta != 0.0:
            entropy = sk.teacher_stats(
                operands.hidden,
                operands.weight,
                teacher_bias=operands.bias,
                config=config,
                workspace_bytes=options.workspace_bytes,
            ).entropy
        weight = bias = None
        if own_head and routed and taught.weight is None:
            # What is gathered is freed, and then the student's again.
            weight = operands.weight.clone()
            bias = None if operands.bias is None else operands.bias.clone()
        return rows, operands.hidden, entropy, weight, bias

    if not int(count):
        return taught
    with evaluating(engine.module), engine.average.applied() if averaged else nullcontext():
        for index in range(int(count)):
            members = groups[index] if index < len(groups) else []
            batch = _batch([contexts[row] for row in members], [responses[row] for row in members])
            tu.assign_non_tensor(batch, temperature=config.temperature, use_remove_padding=engine.use_remove_padding)
            rows, hidden, entropy, weight, bias = engine.with_hidden(batch.to(get_device_id()), read)
            if weight is not None:
                taught = taught._replace(weight=weight, bias=bias)
            lengths = [len(responses[row]) for row in members] or [1]
            # The student's micro-batches are cut among Ulysses' ranks in other places.
            hidden = rows.gather(hidden, engine.sequence_group)
            for row, part in zip(members, hidden.split(lengths), strict=False):
                taught.hidden[row] = part.cpu() if options.offload_teacher_states else part
            if entropy is not None:
                entropy = rows.gather(entropy, engine.sequence_group)
                taught.entropies.update(zip(members, entropy.split(lengths), strict=False))
    return taught


def within_budget(lengths: dict[int, int], budget: int, *, packed: bool) -> list[list[int]]:
    """Rows in order, in groups of at most ``budget`` tokens, with the padding where they are not ``packed``.

    A row that is longer has a group of its own.
    """
    groups: list[list[int]] = []
    for row in lengths:
        sizes = [lengths[x] for x in (*(groups[-1] if groups else []), row)]
        total = sum(sizes) if packed else len(sizes) * max(sizes)
        if not groups or total > budget:
            groups.append([row])
        else:
            groups[-1].append(row)
    return groups


def _batch(contexts: list[Tensor], responses: list[Tensor]) -> TensorDict:
    """A micro-batch in verl's form; of none, two tokens for a forward that the others need."""
    if not contexts:
        contexts = [torch.zeros(2, dtype=torch.long)]
        responses = [contexts[0][1:]]
    positions = [torch.arange(len(ids), device=ids.device) for ids in contexts]
    fields = {"input_ids": contexts, "position_ids": positions, "responses": responses}
    nested = {name: torch.nested.as_nested_tensor(list(x), layout=torch.jagged) for name, x in fields.items()}
    return TensorDict(nested, batch_size=len(contexts))
