"""The forwards of a step: log-probs of completions, the teacher's rows, and the loss.

Each is computed inside of a model's forward, from its hidden states and its head, by functions of srpo_kernels on
operands of one dtype: of a policy and itself the ratio is 1 and the KL is 0.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import srpo_kernels as sk
from srpo_kernels.integrations.transformers import (
    TeacherRows,
    causal_model,
    response_loss,
    response_stats,
    teacher_rows,
)
from srpo_kernels.integrations.transformers.hidden import backbone_of
from srpo_kernels.integrations.transformers.teacher import is_sharded
from srpo_kernels.integrations.trl.images import image_inputs, teacher_image_inputs, with_an_image
from srpo_kernels.integrations.trl.teacher import Teacher, pad_left


def valid_tokens(inputs: dict[str, Any]) -> Tensor:
    """``[B, T]`` bool: the tokens of a micro-batch that are in the loss, those that the model generated.

    The tokens of tools are in its context alone.
    """
    mask: Tensor = inputs["completion_mask"].bool()
    return mask & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask


class RouterLogits:
    """In its context, the load-balancing loss of a mixture of experts: Mixtral's, which all of them take over."""

    def __init__(self, model: Any) -> None:
        self._model = causal_model(model)
        self._seen: list[tuple[Any, Tensor | None]] = []

    def __enter__(self) -> RouterLogits:
        self._hook = backbone_of(self._model).register_forward_hook(self._see, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _see(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self._seen.append((output.router_logits, kwargs.get("attention_mask")))

    def loss(self) -> Tensor:
        """Of the last forward, a scalar with gradient."""
        config = self._model.config.get_text_config()
        logits, mask = self._seen[-1]
        loss: Tensor = load_balancing_loss_func(logits, config.num_experts, config.num_experts_per_tok, mask)
        return loss


class Forwards:
    """Runs models of one head up to their hidden states, and what needs these from there.

    Args:
        accelerator: its autocast is that of every forward.
        config: the options of the loss; its logit transform is that of every log-prob.
        in_head_dtype: the head is multiplied in its own dtype, even under autocast.
        padding_free: models read the tokens of a batch as one row, without padding.
        workspace_bytes: bound of the logits that are alive at a time.
    """

    def __init__(
        self,
        accelerator: Any,
        config: sk.SRPOConfig,
        *,
        in_head_dtype: bool,
        padding_free: bool,
        workspace_bytes: int | None,
    ) -> None:
        self.accelerator, self.config = accelerator, config
        self._options: dict[str, Any] = {
            "config": config,
            "in_head_dtype": in_head_dtype,
            "padding_free": padding_free,
            "workspace_bytes": workspace_bytes,
        }

    def scorer(self, model: Any) -> Any:
        """What TRL calls as a model with a fused LM head: log-probs and entropies ``[B, S]`` of its labels."""

        def call(
            input_ids: Tensor, attention_mask: Tensor, labels: Tensor, fused_lm_head: bool, **inputs: Any
        ) -> SimpleNamespace:
            # No token is before the first one.
            labels = labels.masked_fill(attention_mask.cumsum(1) <= 1, -100)

            def stats() -> sk.TokenStats:
                return response_stats(
                    model, input_ids, attention_mask, labels=labels, model_inputs=inputs, **self._options
                )

            if not inputs.get("output_router_logits"):
                found, aux_loss = stats(), None
            else:
                with RouterLogits(model) as router:
                    found = stats()
                    aux_loss = router.loss()
            return SimpleNamespace(log_probs=found.log_probs, entropy=found.entropy, aux_loss=aux_loss)

        return call

    def teacher_rows(self, teacher: Teacher, inputs: dict[str, Any], pad_id: int) -> TeacherRows | None:
        """The teacher's rows at the valid tokens that are distilled; None where there are none.

        Of a sharded teacher every process runs one row at least.
        """
        routed = inputs["sdpo_mask"]
        if is_sharded(teacher.model):
            routed = with_an_image(_with_one(routed), inputs)
        if not routed.any():
            return None
        rows = routed.nonzero().flatten()
        prompts = [
            inputs["teacher_prompt_ids"][row] or inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()].tolist()
            for row in rows.tolist()
        ]
        prompt_ids, prompt_mask = pad_left(prompts, pad_id, rows.device)
        taught = valid_tokens(inputs) & inputs["sdpo_mask"][:, None]
        with self.accelerator.autocast():
            return teacher_rows(
                teacher.model,
                torch.cat([prompt_ids, inputs["completion_ids"][rows]], 1),
                torch.cat([prompt_mask, inputs["completion_mask"][rows]], 1),
                response_mask=_behind(taught[rows], prompt_ids.shape[1]),
                model_inputs=teacher_image_inputs(inputs, rows),
                **self._options,
            )

    def loss(
        self, model: Any, inputs: dict[str, Any], rows: Tensor, *, has_aux_loss: bool = False
    ) -> tuple[sk.SRPOOutput, Tensor | None]:
        """The loss of some ``rows`` of a micro-batch, and that of a router, if it is asked for.

        ``log_probs`` are ``[B, T]``: 0 where a completion had no forward.
        """
        valid = valid_tokens(inputs)
        prompt_length = inputs["prompt_ids"].shape[1]

        def per_token(name: str) -> Tensor | None:
            values = inputs.get(name)
            if values is None or values.ndim == 1 or values.shape[1] == 1:
                return None if values is None else values[rows]
            return _behind(values[rows], prompt_length)

        def run(**model_inputs: Any) -> sk.SRPOOutput:
            return response_loss(
                model,
                **_tokens_of(inputs, rows, **model_inputs),
                advantages=per_token("advantages"),
                sdpo_mask=inputs["sdpo_mask"][rows],
                teacher=inputs["teacher"],
                old_log_probs=per_token("old_per_token_logps"),
                ref_log_probs=per_token("ref_per_token_logps"),
                is_weights=per_token("importance_sampling_ratio"),
                normalizers=inputs["normalizers"],
                **self._options,
            )

        aux_loss = None
        with self.accelerator.autocast():
            if has_aux_loss:
                with RouterLogits(model) as router:
                    out = run(output_router_logits=True)
                    aux_loss = router.loss()
            else:
                out = run()
        log_probs = out.log_probs.new_zeros(valid.shape)
        log_probs[rows] = out.log_probs[:, prompt_length:]
        return out._replace(log_probs=log_probs), aux_loss

    @torch.no_grad()
    def stats(self, model: Any, inputs: dict[str, Any], rows: Tensor) -> sk.TokenStats:
        """Log-probs and entropies of some ``rows``, ``[n, T]``, without gradient."""
        prompt_length = inputs["prompt_ids"].shape[1]
        with self.accelerator.autocast():
            stats = response_stats(model, **_tokens_of(inputs, rows), **self._options)
        return sk.TokenStats._make(None if x is None else x[:, prompt_length:] for x in stats)

    def moving(self, inputs: dict[str, Any]) -> Tensor:
        """``[B]`` bool: the sequences that can move a weight, and what a loss of 0 needs for its forward."""
        advantages = inputs["advantages"]
        moving = inputs["sdpo_mask"] | (advantages != 0.0).view(len(advantages), -1).any(1)
        if self.config.kl_coef != 0.0 or self.config.entropy_coef != 0.0:
            moving = torch.ones_like(moving)
        return with_an_image(_with_one(moving & valid_tokens(inputs).any(1)), inputs)


def _with_one(rows: Tensor) -> Tensor:
    """``rows``, ``[B]`` bool, or the first one where there are none."""
    return rows | (~rows.any() & (torch.arange(len(rows), device=rows.device) == 0))


def _tokens_of(inputs: dict[str, Any], rows: Tensor, **model_inputs: Any) -> dict[str, Any]:
    """Some ``rows`` of a micro-batch, as ``response_loss`` and ``response_stats`` take them."""
    return {
        "input_ids": torch.cat([inputs["prompt_ids"][rows], inputs["completion_ids"][rows]], 1),
        "attention_mask": torch.cat([inputs["prompt_mask"][rows], inputs["completion_mask"][rows]], 1),
        "response_mask": _behind(valid_tokens(inputs)[rows], inputs["prompt_ids"].shape[1]),
        "model_inputs": image_inputs(inputs, rows) | model_inputs,
    }


def _behind(values: Tensor, length: int) -> Tensor:
    """``[B, T]`` behind a prompt of that length, where it is 0."""
    return nn.functional.pad(values, (length, 0))
