"""The forwards of a step: log-probs of completions, the teacher's rows, and the loss.

Each is computed inside of a model's forward, from its hidden states and its head, by functions of srpo_kernels on
operands of one dtype: of a policy and itself the ratio is 1 and the KL is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

import srpo_kernels as sk
from srpo_kernels.integrations.trl.head import Head, head_operands
from srpo_kernels.integrations.trl.teacher import Teacher, pad_left

T = TypeVar("T")


class TeacherRows(NamedTuple):
    """The teacher of a micro-batch: hidden states ``[N_sdpo, H]`` of its valid routed rows, and entropies.

    ``entropy`` is ``[B_sdpo, T]``, 0 at other rows; None where no weight needs it.
    """

    hidden: Tensor
    entropy: Tensor | None


def valid_tokens(inputs: dict[str, Any]) -> Tensor:
    """``[B, T]`` bool: the tokens of a micro-batch that are in the loss, those that the model generated.

    The tokens of tools are in its context alone.
    """
    mask: Tensor = inputs["completion_mask"].bool()
    return mask & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask


class Forwards:
    """Runs models of one head up to their hidden states, and what needs these from there.

    Args:
        accelerator: its autocast is that of every forward.
        config: the options of the loss; its logit transform is that of every log-prob.
        in_head_dtype: the head is multiplied in its own dtype, even under autocast.
        workspace_bytes: bound of the logits that are alive at a time.
    """

    def __init__(
        self, accelerator: Any, config: sk.SRPOConfig, *, in_head_dtype: bool, workspace_bytes: int | None
    ) -> None:
        self.accelerator, self.config = accelerator, config
        self.in_head_dtype, self.workspace_bytes = in_head_dtype, workspace_bytes

    def completion_stats(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the last ``length`` tokens, ``[B, length]`` each, 0 where they are padding."""
        mask = attention_mask[:, -length:].bool()

        def stats(hidden: Tensor, head: nn.Linear) -> tuple[Tensor, Tensor]:
            hidden, weight, bias = self._operands(hidden[:, -length - 1 : -1][mask], head)
            stats = sk.token_stats(
                hidden,
                weight,
                input_ids[:, -length:][mask],
                bias=bias,
                config=self.config,
                workspace_bytes=self.workspace_bytes,
            )
            return stats.log_probs, stats.entropy

        values = self._run(model, input_ids, attention_mask, stats)
        log_probs, entropy = (value.new_zeros(mask.shape).masked_scatter(mask, value) for value in values)
        return log_probs, entropy

    @torch.no_grad()
    def teacher_rows(self, teacher: Teacher, inputs: dict[str, Any], pad_id: int) -> TeacherRows | None:
        """The teacher's rows at the valid tokens that are distilled; None where there are none."""
        routed = inputs["sdpo_mask"]
        valid = valid_tokens(inputs)[routed]
        if not valid.any():
            return None
        prompts = [inputs["teacher_prompt_ids"][row] for row in routed.nonzero().flatten().tolist()]
        prompt_ids, prompt_mask = pad_left(prompts, pad_id, valid.device)

        def rows(hidden: Tensor, head: nn.Linear) -> TeacherRows:
            hidden, weight, bias = self._operands(hidden[:, -valid.shape[1] - 1 : -1], head)
            if self.config.dw_beta == 0.0:
                return TeacherRows(hidden[valid], None)
            stats = sk.teacher_stats(
                hidden,
                weight,
                mask=valid,
                teacher_bias=bias,
                config=self.config,
                workspace_bytes=self.workspace_bytes,
            )
            return TeacherRows(hidden[valid], stats.entropy)

        input_ids = torch.cat([prompt_ids, inputs["completion_ids"][routed]], 1)
        return self._run(teacher, input_ids, torch.cat([prompt_mask, inputs["completion_mask"][routed]], 1), rows)

    def loss(self, model: Any, teacher: Teacher, inputs: dict[str, Any]) -> sk.SRPOOutput:
        """The loss of a micro-batch, whose ``log_probs`` are ``[B, T]``: 0 where a completion had no forward."""
        valid = valid_tokens(inputs)
        rows = self._rows_to_run(inputs, valid)
        mask = valid[rows]
        sequence_ids = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)
        advantages = inputs["advantages"][rows, None].expand_as(mask)
        sdpo_mask = inputs["sdpo_mask"][rows, None].expand_as(mask)
        teacher_rows: TeacherRows | None = inputs["teacher"]

        def packed(name: str) -> Tensor | None:
            values = inputs.get(name)
            return None if values is None else values[rows].expand_as(mask)[mask]

        def loss(hidden: Tensor, head: nn.Linear) -> sk.SRPOOutput:
            # Only valid rows: padding costs neither memory nor products from here on.
            hidden, weight, bias = self._operands(hidden[:, -mask.shape[1] - 1 : -1][mask], head)
            taught: dict[str, Any] = {}
            if teacher_rows is not None:
                teacher_bias = None if head.bias is None else teacher.value(head.bias).to(weight.dtype)
                taught = {
                    "sdpo_mask": sdpo_mask[mask],
                    "teacher_hidden": teacher_rows.hidden,
                    "teacher_weight": teacher.value(head.weight).to(weight.dtype),
                    "teacher_bias": teacher_bias,
                }
            return sk.srpo_loss(
                hidden,
                weight,
                inputs["completion_ids"][rows][mask],
                advantages=advantages[mask],
                bias=bias,
                old_log_probs=packed("old_per_token_logps"),
                ref_log_probs=packed("ref_per_token_logps"),
                is_weights=packed("importance_sampling_ratio"),
                sequence_ids=sequence_ids[mask],
                normalizers=inputs["normalizers"],
                config=self.config,
                workspace_bytes=self.workspace_bytes,
                **taught,
            )

        input_ids = torch.cat([inputs["prompt_ids"][rows], inputs["completion_ids"][rows]], 1)
        attention_mask = torch.cat([inputs["prompt_mask"][rows], inputs["completion_mask"][rows]], 1)
        out = self._run(model, input_ids, attention_mask, loss)
        log_probs = out.log_probs.new_zeros(valid.shape)
        log_probs[rows] = log_probs[rows].masked_scatter(mask, out.log_probs)
        return out._replace(log_probs=log_probs)

    def _rows_to_run(self, inputs: dict[str, Any], valid: Tensor) -> Tensor:
        """Indices of the sequences that can move a weight; the first one where none can, for a loss of 0."""
        moving = inputs["sdpo_mask"] | (inputs["advantages"] != 0.0)
        if self.config.kl_coef != 0.0 or self.config.entropy_coef != 0.0:
            moving = torch.ones_like(moving)
        moving &= valid.any(1)
        moving[0] |= ~moving.any()
        rows: Tensor = moving.nonzero().flatten()
        return rows

    def _operands(self, hidden: Tensor, head: nn.Linear) -> Head:
        return head_operands(hidden, head, in_head_dtype=self.in_head_dtype)

    def _run(self, model: Any, input_ids: Tensor, attention_mask: Tensor, on_hidden: Callable[..., T]) -> T:
        with self.accelerator.autocast():
            result: T = model(input_ids=input_ids, attention_mask=attention_mask, on_hidden=on_hidden)
        return result
