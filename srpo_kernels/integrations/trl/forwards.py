"""The forwards of a step: log-probs of completions, the teacher's rows, and the loss.

Each is computed inside of a model's forward, from its hidden states and its head, by functions of srpo_kernels on
operands of one dtype: of a policy and itself the ratio is 1 and the KL is 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import srpo_kernels as sk
from srpo_kernels.integrations.transformers import TeacherRows, response_loss, response_stats, teacher_rows
from srpo_kernels.integrations.trl.teacher import Teacher, pad_left


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
        self._options: dict[str, Any] = {
            "config": config,
            "in_head_dtype": in_head_dtype,
            "workspace_bytes": workspace_bytes,
        }

    def completion_stats(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the last ``length`` tokens, ``[B, length]`` each, 0 where they are padding."""
        mask = _behind(attention_mask[:, -length:].bool(), attention_mask.shape[1] - length)
        with self.accelerator.autocast():
            stats = response_stats(model, input_ids, attention_mask, response_mask=mask, **self._options)
        return stats.log_probs[:, -length:], stats.entropy[:, -length:]

    def teacher_rows(self, teacher: Teacher, inputs: dict[str, Any], pad_id: int) -> TeacherRows | None:
        """The teacher's rows at the valid tokens that are distilled; None where there are none."""
        routed = inputs["sdpo_mask"]
        valid = valid_tokens(inputs)[routed]
        if not valid.any():
            return None
        prompts = [inputs["teacher_prompt_ids"][row] for row in routed.nonzero().flatten().tolist()]
        prompt_ids, prompt_mask = pad_left(prompts, pad_id, valid.device)
        with self.accelerator.autocast():
            return teacher_rows(
                teacher.model,
                torch.cat([prompt_ids, inputs["completion_ids"][routed]], 1),
                torch.cat([prompt_mask, inputs["completion_mask"][routed]], 1),
                response_mask=_behind(valid, prompt_ids.shape[1]),
                **self._options,
            )

    def loss(self, model: Any, inputs: dict[str, Any]) -> sk.SRPOOutput:
        """The loss of a micro-batch, whose ``log_probs`` are ``[B, T]``: 0 where a completion had no forward."""
        valid = valid_tokens(inputs)
        rows = self._rows_to_run(inputs, valid)
        prompt_length = inputs["prompt_ids"].shape[1]

        def per_token(name: str) -> Tensor | None:
            values = inputs.get(name)
            if values is None or values.shape[1] == 1:
                return None if values is None else values[rows]
            return _behind(values[rows], prompt_length)

        with self.accelerator.autocast():
            out = response_loss(
                model,
                torch.cat([inputs["prompt_ids"][rows], inputs["completion_ids"][rows]], 1),
                torch.cat([inputs["prompt_mask"][rows], inputs["completion_mask"][rows]], 1),
                response_mask=_behind(valid[rows], prompt_length),
                advantages=inputs["advantages"][rows],
                sdpo_mask=inputs["sdpo_mask"][rows],
                teacher=inputs["teacher"],
                old_log_probs=per_token("old_per_token_logps"),
                ref_log_probs=per_token("ref_per_token_logps"),
                is_weights=per_token("importance_sampling_ratio"),
                normalizers=inputs["normalizers"],
                **self._options,
            )
        log_probs = out.log_probs.new_zeros(valid.shape)
        log_probs[rows] = out.log_probs[:, prompt_length:]
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


def _behind(values: Tensor, length: int) -> Tensor:
    """``[B, T]`` behind a prompt of that length, where it is 0."""
    return nn.functional.pad(values, (length, 0))
