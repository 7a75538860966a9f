"""What models say of responses, from token ids: log-probs and entropies, and the rows of a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakSet

from torch import Tensor, nn

import srpo_kernels as sk
from srpo_kernels.integrations.transformers.adapters import linear_head
from srpo_kernels.integrations.transformers.check import check_model
from srpo_kernels.integrations.transformers.head import head_operands, resolve_config, teacher_config
from srpo_kernels.integrations.transformers.hidden import call_with_hidden, causal_model, evaluating, lm_head
from srpo_kernels.integrations.transformers.responses import find_responses, on_device
from srpo_kernels.integrations.transformers.teacher import AverageTeacher, is_sharded
from srpo_kernels.integrations.transformers.tensor_parallel import shard_of

# By ``padding_free``.
_CHECKED: dict[bool, WeakSet[Any]] = {False: WeakSet(), True: WeakSet()}


class TeacherRows(NamedTuple):
    """What a teacher says of the N tokens that it teaches: ``teacher_rows`` makes it, ``response_loss`` takes it.

    ``hidden``: ``[N, H_t]``, detached; ``target_ids``: ``[N]``; ``entropy``: ``[N]``, in nats, or None where no weight
    needs it; ``teacher``: whose they are.
    """

    hidden: Tensor
    target_ids: Tensor
    entropy: Tensor | None
    teacher: nn.Module | AverageTeacher


def response_stats(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    response_mask: Tensor | None = None,
    labels: Tensor | None = None,
    config: sk.SRPOConfig | None = None,
    in_head_dtype: bool = False,
    padding_free: bool = False,
    model_inputs: Mapping[str, Any] | None = None,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> sk.TokenStats:
    """Log-probs and entropies of responses, without the logits: those of an old or reference policy, or for a loss.

    Takes what ``response_loss`` takes of that name.

    Returns:
        ``TokenStats`` without a teacher, in ``input_ids``' shape: a token's own log-prob and so on, 0 for tokens that
        are in no response; with gradient unless it is called under ``torch.no_grad()``.
    """
    config = checked_config(model, config, padding_free=padding_free)
    responses = find_responses(input_ids, attention_mask, response_mask, labels)

    def stats(hidden: Tensor, head: nn.Module) -> sk.TokenStats:
        operands = head_operands(responses.hidden(hidden), head, in_head_dtype=in_head_dtype)
        (rows, weight, bias), group = shard_of(operands)
        found = sk.token_stats(
            rows,
            weight,
            responses.target_ids.to(weight.device),
            bias=bias,
            config=config,
            backend=backend,
            workspace_bytes=workspace_bytes,
            vocab_parallel_group=group,
        )
        return on_device(found, input_ids.device)

    packed = call_with_hidden(
        model,
        stats,
        input_ids=input_ids,
        attention_mask=attention_mask,
        padding_free=padding_free,
        **(model_inputs or {}),
    )
    return sk.TokenStats._make(None if x is None else responses.unpack(x) for x in packed)


def teacher_rows(
    teacher: nn.Module | AverageTeacher,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    response_mask: Tensor | None = None,
    labels: Tensor | None = None,
    config: sk.SRPOConfig | None = None,
    entropy: bool = True,
    in_head_dtype: bool = False,
    padding_free: bool = False,
    model_inputs: Mapping[str, Any] | None = None,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> TeacherRows:
    """A teacher's hidden states and entropies at the tokens that it teaches, without gradient and dropout.

    Takes what ``response_loss`` takes of that name, of the distilled sequences alone and as the teacher reads them:
    another prompt, the same responses. Batches without a row need no forward. The entropies are for
    ``response_normalizers``, which come before the losses of several micro-batches or ranks.

    Args:
        teacher: a causal language model, the trained one itself among them, or an ``AverageTeacher``.
        entropy: whether to compute them, where ``config.dw_beta`` is not 0: one more matmul.
    """
    source = teacher.model if isinstance(teacher, AverageTeacher) else teacher
    config = teacher_config(source, config)
    check_once(source, padding_free=padding_free)
    responses = find_responses(input_ids, attention_mask, response_mask, labels, "teacher_")
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "padding_free": padding_free,
        **(model_inputs or {}),
    }

    def rows(hidden: Tensor, head: nn.Module) -> TeacherRows:
        operands, group = shard_of(head_operands(responses.hidden(hidden), head, in_head_dtype=in_head_dtype))
        entropies = None
        if entropy and config.dw_beta != 0.0:
            entropies = sk.teacher_stats(
                operands.hidden,
                operands.weight,
                teacher_bias=operands.bias,
                config=config,
                backend=backend,
                workspace_bytes=workspace_bytes,
                vocab_parallel_group=group,
            ).entropy
        return TeacherRows(operands.hidden, responses.target_ids, on_device(entropies, input_ids.device), teacher)

    if not len(input_ids):
        if is_sharded(teacher):
            raise ValueError(
                "input_ids must have a row of a teacher that is sharded, whose forward every rank takes part in; its "
                "response_mask may be False"
            )
        head = lm_head(causal_model(source))
        weight = linear_head(head).weight
        return rows(weight.new_empty(0, input_ids.shape[1], weight.shape[1]), head)
    if isinstance(teacher, AverageTeacher):
        return teacher.call_with_hidden(rows, **inputs)
    with evaluating(teacher):
        return call_with_hidden(teacher, rows, **inputs)


def response_normalizers(
    response_mask: Tensor,
    sdpo_mask: Tensor | None = None,
    teacher: TeacherRows | None = None,
    *,
    config: sk.SRPOConfig,
) -> sk.Normalizers:
    """The ``Normalizers`` of a micro-batch, to be merged with those of the others of an optimizer step.

    Args:
        response_mask: ``[B, S]``, bool: the student's.
        sdpo_mask: ``[B]``, bool: the sequences that are distilled.
        teacher: the rows of these, in order; None where there are none, or no entropies are needed.
        config: that of the loss.
    """
    entropy = None
    if teacher is not None and teacher.entropy is not None and sdpo_mask is not None:
        distilled = response_mask & sdpo_mask[:, None]
        entropy = teacher.entropy.new_zeros(response_mask.shape).masked_scatter(distilled, teacher.entropy)
    return sk.Normalizers.from_batch(response_mask, sdpo_mask, entropy, config=config)


def checked_config(model: nn.Module, config: sk.SRPOConfig | None, *, padding_free: bool) -> sk.SRPOConfig:
    """``resolve_config``, for a model that has been checked."""
    config = resolve_config(model, config)
    check_once(model, padding_free=padding_free)
    return config


def check_once(model: nn.Module, *, padding_free: bool) -> None:
    """``check_model``, the first time that a model comes."""
    base, checked = causal_model(model), _CHECKED[padding_free]
    if base not in checked:
        check_model(model, padding_free=padding_free)
        checked.add(base)
