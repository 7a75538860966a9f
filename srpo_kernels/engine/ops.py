"""The autograd boundary: the engine's two paths as differentiable functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from srpo_kernels.config import SRPOConfig
from srpo_kernels.engine import stats
from srpo_kernels.engine.batch import Batch, FusedResult, Head, Needs
from srpo_kernels.engine.fused import FusedPass
from srpo_kernels.engine.plan import Plan
from srpo_kernels.rows import DivergenceStats, RowGradients, RowPasses


def fused_loss(
    batch: Batch, plan: Plan, config: SRPOConfig, needs: Needs, passes: RowPasses
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, log-probs ``[N]`` and metrics; only the loss carries gradient, to the batch's hidden states and head."""
    loss, log_probs, metrics = _FusedLoss.apply(batch.hidden, *batch.head, batch, plan, config, needs, passes)
    return loss, log_probs, metrics


def token_stats(hidden: Tensor, head: Head, call: stats.StatsCall, needs: Needs) -> list[Tensor | None]:
    """Log-probs, entropy, divergence and teacher entropy ``[n]``; the first three carry gradient."""
    outputs: list[Tensor | None] = list(_TokenStats.apply(hidden, *head, call, needs))
    return outputs


class _FusedLoss(torch.autograd.Function):
    """The gradients are ready when the forward ends; the backward multiplies them by the upstream gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        batch: Batch,
        plan: Plan,
        config: SRPOConfig,
        needs: Needs,
        passes: RowPasses,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        with torch.autocast(hidden.device.type, enabled=False):
            result: FusedResult = FusedPass(batch, plan, config, needs, passes).run()
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.save_for_backward(result.grad_hidden, result.grad_weight, result.grad_bias)
        ctx.mark_non_differentiable(result.log_probs)
        return result.loss, result.log_probs, result.metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss.numel() != 1:
            raise RuntimeError(f"srpo_loss takes a scalar upstream gradient, got {list(grad_loss.shape)}")
        scaled = [_scale(x, grad_loss) for x in ctx.saved_tensors]
        grads = [x if x is None else x.to(dtype) for x, dtype in zip(scaled, ctx.dtypes, strict=True)]
        return (*grads, None, None, None, None, None)


def _scale(grad: Tensor | None, factor: Tensor) -> Tensor | None:
    """``grad * factor`` without a host sync; in place when nobody can ask for the gradient a second time."""
    if grad is None:
        return None
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return grad * factor
    if factor.device.type == "cpu" and factor.item() == 1.0:
        return grad
    return grad.mul_(factor)


class _TokenStats(torch.autograd.Function):
    """Saves the statistics, not the logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: stats.StatsCall, needs: Needs
    ) -> tuple[Tensor | None, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            result = stats.forward(hidden, Head(weight, bias), call)
        ctx.call, ctx.needs, ctx.stats_type = call, needs, type(result)
        ctx.save_for_backward(hidden, weight, bias, *result)
        if not isinstance(result, DivergenceStats):
            return result.log_probs, result.entropy, None, None
        ctx.mark_non_differentiable(result.teacher_entropy)
        return result.log_probs, result.entropy, result.divergence, result.teacher_entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor, grad_divergence: Tensor | None, _: Any
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *saved = ctx.saved_tensors
        result = ctx.stats_type(*saved)
        grads = RowGradients(grad_log_probs, grad_entropy, grad_divergence)
        with torch.autocast(hidden.device.type, enabled=False):
            return (
                *stats.backward(hidden, Head(weight, bias), ctx.call, result, grads, ctx.needs),
                None,
                None,
            )
