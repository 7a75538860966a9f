"""``srpo_loss`` of responses, from token ids: positions, shift, head and logit transform are the model's."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import srpo_kernels as sk
from srpo_kernels.integrations.transformers.adapters import linear_of, modules_in_use
from srpo_kernels.integrations.transformers.head import Head, head_operands, head_weight, teacher_config
from srpo_kernels.integrations.transformers.hidden import call_with_hidden, causal_model, lm_head
from srpo_kernels.integrations.transformers.responses import find_responses, on_device
from srpo_kernels.integrations.transformers.shards import whole_parameters
from srpo_kernels.integrations.transformers.statistics import TeacherRows, checked_config, teacher_rows
from srpo_kernels.integrations.transformers.teacher import AverageTeacher, is_sharded
from srpo_kernels.integrations.transformers.tensor_parallel import rows_of, shard_of


def response_loss(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    response_mask: Tensor | None = None,
    labels: Tensor | None = None,
    advantages: Tensor | None = None,
    sdpo_mask: Tensor | None = None,
    teacher: nn.Module | AverageTeacher | TeacherRows | None = None,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    is_weights: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    support_ids: Tensor | None = None,
    normalizers: sk.Normalizers | None = None,
    config: sk.SRPOConfig | None = None,
    in_head_dtype: bool = False,
    padding_free: bool = False,
    model_inputs: Mapping[str, Any] | None = None,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> sk.SRPOOutput:
    """``srpo_loss`` of responses in rows of token ids, with any causal language model of transformers.

    Padding may be anywhere in a row: a token has the log-prob that it has in a row without padding, given the tokens
    before it. Per-token tensors are in ``input_ids``' shape, at the token's own place: the ``log_probs`` of one call
    are the ``old_log_probs`` of another. The first call with a model runs ``check_model`` on it.

    Args:
        model: bare, of PEFT, in DDP, in FSDP1, after ``fully_shard``: see ``call_with_hidden``. Its mode, autocast and
            gradient checkpointing are those of a forward.
        input_ids: ``[B, S]``: prompts and responses.
        attention_mask: ``[B, S]``: 0 at padding. None: there is none.
        response_mask: ``[B, S]``: the tokens of ``input_ids`` that are in the loss.
        labels: in its place, as transformers has them: -100 at tokens that are not in the loss, the token elsewhere.
        advantages: ``[B]`` or ``[B, S]``; None only when every sequence is distilled.
        sdpo_mask: ``[B]``, bool: the sequences to distill. None: none.
        teacher: what ``teacher_rows`` has made of the distilled sequences, with another prompt before the same
            responses. Or a model of the same vocabulary, ``model`` itself or an ``AverageTeacher``, which then reads
            the student's own rows. Its logit transform may be another: it is ``config.teacher_transform``, made of
            the teacher's config and ``config.temperature`` where that is None.
        old_log_probs: ``[B, S]``, as in ``srpo_loss``.
        ref_log_probs: the same.
        is_weights: the same.
        rollout_log_probs: the same.
        support_ids: ``[B, S, K]``, as in ``srpo_loss``.
        normalizers: those of the whole optimizer batch, of ``response_normalizers``. None: this call is all of it.
        config: every option, with the logit transform of ``model``: ``config_for`` makes it. None: its defaults.
        in_head_dtype: the head is multiplied in its own dtype, even under autocast.
        padding_free: the model reads the rows' tokens one sequence after the other, and no padding. A model for which
            that is not the same is refused: see ``last_hidden_states``.
        model_inputs: more arguments of the forward, such as ``token_type_ids``; per token they are ``[B, S, ...]``.
        backend: as in ``srpo_loss``.
        workspace_bytes: as in ``srpo_loss``.

    Returns:
        As ``srpo_loss``; ``log_probs`` is ``[B, S]``.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name; a model that ``check_model`` refuses, a teacher
            with another vocabulary or response, and what ``srpo_loss`` raises.
    """
    config = checked_config(model, config, padding_free=padding_free)
    responses = find_responses(input_ids, attention_mask, response_mask, labels)
    per_token: dict[str, Any] = {
        name: responses.pack(name, values)
        for name, values in {
            "advantages": advantages,
            "old_log_probs": old_log_probs,
            "ref_log_probs": ref_log_probs,
            "is_weights": is_weights,
            "rollout_log_probs": rollout_log_probs,
            "support_ids": support_ids,
        }.items()
    }
    taught = None
    if sdpo_mask is not None:
        _check_sdpo_mask(sdpo_mask, input_ids)
        per_token["sdpo_mask"] = sdpo_mask[responses.rows]
    if teacher is not None:
        if sdpo_mask is None:
            raise ValueError("teacher needs sdpo_mask, which says what sequences it teaches; got sdpo_mask=None")
        _check_teacher(model, teacher)
        config = teacher_config(_source(teacher), config)
        if isinstance(teacher, TeacherRows):
            taught = teacher
        elif sdpo_mask.any() or is_sharded(teacher):
            # A rank with nothing to distill takes part in the forward of a sharded teacher.
            rows = sdpo_mask if sdpo_mask.any() else torch.arange(len(sdpo_mask), device=sdpo_mask.device) == 0
            taught = teacher_rows(
                teacher,
                input_ids[rows],
                None if attention_mask is None else attention_mask[rows],
                response_mask=(responses.mask & sdpo_mask[:, None])[rows],
                config=config,
                entropy=False,
                in_head_dtype=in_head_dtype,
                padding_free=padding_free,
                model_inputs={name: _rows_of(value, rows) for name, value in (model_inputs or {}).items()},
            )
        if taught is not None and not torch.equal(taught.target_ids, responses.target_ids[per_token["sdpo_mask"]]):
            raise ValueError(
                "teacher must be taught rows with the responses of the distilled sequences, in order: got "
                f"{len(taught.target_ids)} tokens for {int(per_token['sdpo_mask'].sum())}, or others"
            )

    def loss(hidden: Tensor, head: nn.Module) -> sk.SRPOOutput:
        operands = head_operands(responses.hidden(hidden), head, in_head_dtype=in_head_dtype)
        (rows, weight, bias), group = shard_of(operands)
        shown: dict[str, Any] = {}
        if taught is not None:
            teacher_weight, teacher_bias = _teacher_head(model, taught, operands, in_head_dtype) or (weight, bias)
            if len(taught.hidden):
                # FSDP gathers a parameter in another dtype than that of its shards.
                dtype = taught.hidden.dtype
                shown = {
                    "teacher_hidden": taught.hidden,
                    "teacher_weight": teacher_weight.detach().to(dtype),
                    "teacher_bias": None if teacher_bias is None else teacher_bias.detach().to(dtype),
                }
        beside = {"target_ids": responses.target_ids, "sequence_ids": responses.rows, "normalizers": normalizers}
        out = sk.srpo_loss(
            rows,
            weight,
            bias=bias,
            config=config,
            backend=backend,
            workspace_bytes=workspace_bytes,
            vocab_parallel_group=group,
            **on_device(beside | per_token | shown, weight.device),
        )
        return on_device(out, input_ids.device)

    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **(model_inputs or {})}
    out = call_with_hidden(model, loss, padding_free=padding_free, **inputs)
    return out._replace(log_probs=responses.unpack(out.log_probs))


def _source(teacher: nn.Module | AverageTeacher | TeacherRows) -> nn.Module:
    """The model that a teacher runs."""
    teacher = teacher.teacher if isinstance(teacher, TeacherRows) else teacher
    return teacher.model if isinstance(teacher, AverageTeacher) else teacher


def _teacher_head(
    model: nn.Module, taught: TeacherRows, student: Head, in_head_dtype: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of the teacher's head, in the shards of the student's; None for those of ``model`` as it is."""
    source, like = causal_model(_source(taught)), student.weight
    head, is_student = lm_head(source), source is causal_model(model)
    average = taught.teacher if isinstance(taught.teacher, AverageTeacher) else None
    if is_student and average is None:
        return None
    # The student's are whole in its own forward.
    parameters = nullcontext() if is_student else whole_parameters(_source(taught), modules_in_use(head), like)
    with parameters, nullcontext() if average is None else average.applied(head, like):
        weight, bias = head_weight(head, in_head_dtype=in_head_dtype)
        return rows_of(weight, like), None if bias is None else rows_of(bias, like)


def _check_sdpo_mask(sdpo_mask: object, input_ids: Tensor) -> None:
    if not isinstance(sdpo_mask, Tensor) or sdpo_mask.dtype != torch.bool:
        kind = sdpo_mask.dtype if isinstance(sdpo_mask, Tensor) else type(sdpo_mask).__name__
        raise TypeError(f"sdpo_mask must be a bool tensor or None, got {kind}")
    if sdpo_mask.shape != input_ids.shape[:1]:
        raise ValueError(f"sdpo_mask must have shape [B], [{len(input_ids)}], got {list(sdpo_mask.shape)}")


def _check_teacher(model: nn.Module, teacher: Any) -> None:
    source = _source(teacher)
    sizes = [linear_of(lm_head(causal_model(x))).out_features for x in (source, model)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"teacher must have the tokenizer of model, whose vocabulary has {sizes[1]} tokens, got one with {sizes[0]}"
        )


def _rows_of(value: Any, rows: Tensor) -> Any:
    return value[rows] if isinstance(value, Tensor) and value.shape[:1] == rows.shape else value
