"""``srpo_loss`` and ``fused_loss`` as an operation: their gradients are ready when the forward ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from srpo_kernels.engine import gemm, ops, workspace
from srpo_kernels.engine.agreement import agree
from srpo_kernels.engine.arguments import LossArguments, LossOptions, parse
from srpo_kernels.engine.backends import rows_of
from srpo_kernels.engine.batch import Batch, FusedResult, Needs
from srpo_kernels.engine.columns import NotByColumns
from srpo_kernels.engine.custom import prepare_custom
from srpo_kernels.engine.fused import FusedPass
from srpo_kernels.engine.objectives import Objective
from srpo_kernels.engine.plan import Plan
from srpo_kernels.engine.prepare import flat_rows, row_spec
from srpo_kernels.engine.row_values import warn_of_weights
from srpo_kernels.engine.srpo import prepare_srpo
from srpo_kernels.losses.config import SRPOConfig
from srpo_kernels.losses.srpo import METRICS
from srpo_kernels.rows.dtypes import accumulation_dtype
from srpo_kernels.rows.passes import RowPasses


def fused_loss(call: LossArguments, options: LossOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, log-probs in the shape of ``target_ids``, and more: SRPO's ``METRICS`` as one vector, or each row's loss.

    Only the loss carries gradient, to hidden states, weight and bias.
    """
    if callable(options.objective) and ops.traced(call):
        raise ValueError(
            "objective must be the name of a registered policy loss in a compiled graph, which cannot call a function "
            "back, got a function: register_policy_loss gives it a name"
        )
    loss, log_probs, more, *_ = ops.run(torch.ops.srpo_kernels.fused_loss, _FusedLoss, call, options)
    # The backward knows the operation's own result again: the caller's may be changed in place.
    return loss.clone(), log_probs, more


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    """Loss, log-probs, what an objective has beside them, and the gradients over their scale, which comes last."""
    call, options, needs = parse(arguments, LossArguments, LossOptions, Needs)
    config = SRPOConfig.decode(options.config)
    with torch.autocast(call.hidden.device.type, enabled=False):
        passes = RowPasses(rows_of(options.backend), agree(call, options, needs))
        if options.objective == "srpo":
            batch, plan, objective, is_whole = prepare_srpo(call, config, options, needs, passes)
            result = _run(call, batch, plan, objective, config, needs, passes)
            metrics = objective.metrics | {"nonfinite_rows": result.nonfinite_rows}
            if is_whole and config.dw_beta > 0.0:
                warn_of_weights(float(metrics["dw_weight_sum"]), len(plan.order.taught), config)
            more = _vector([metrics[name] for name in METRICS], result.loss)
        else:
            batch, plan, custom = prepare_custom(call, config, options, needs, passes)
            result = _run(call, batch, plan, custom, config, needs, passes)
            custom.check_values()
            more = result.losses.view(call.target_ids.shape)
    grad_hidden = None if result.grad_hidden is None else result.grad_hidden.view(call.hidden.shape)
    return (
        result.loss,
        result.log_probs.view(call.target_ids.shape),
        more,
        *ops.dense((grad_hidden, result.grad_weight, result.grad_bias), result.loss),
        torch.ones_like(result.loss) if result.grad_scale is None else result.grad_scale,
    )


def _vector(numbers: list[Tensor | float], like: Tensor) -> Tensor:
    """Of numbers of the device and of the host, without a copy from one to the other."""
    same = {x: like.new_full((), x) for x in numbers if not isinstance(x, Tensor)}
    return torch.stack([x.to(like) if isinstance(x, Tensor) else same[x] for x in numbers])


def _run(
    call: LossArguments,
    batch: Batch,
    plan: Plan,
    objective: Objective,
    config: SRPOConfig,
    needs: Needs,
    passes: RowPasses,
) -> FusedResult:
    spec, dtype = row_spec(call, config, passes.vocabulary), accumulation_dtype(call.hidden, call.weight)
    while True:
        size, device, waiting_rows = len(call.weight), call.hidden.device, plan.waiting_rows if any(needs) else 0
        with (
            workspace.borrowed(plan.buffer_rows, size, dtype, device) as buffer,
            workspace.borrowed(waiting_rows, size, gemm.dlogits_dtype(call.weight, dtype), device) as waiting,
        ):
            try:
                return FusedPass(batch, plan, objective, spec, needs, passes, buffer, waiting).run()
            except NotByColumns:
                plan = replace(plan, columns=False, taught_columns=False)


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    call, options, needs = parse(arguments, LossArguments, LossOptions, Needs)
    hidden, weight, bias = call[:3]
    loss = hidden.new_empty((), dtype=accumulation_dtype(hidden, weight))
    gradients = (
        torch.empty_like(flat_rows(hidden), dtype=loss.dtype).view(hidden.shape) if needs.hidden else None,
        loss.new_empty(weight.shape) if needs.weight else None,
        loss.new_empty(bias.shape) if needs.bias else None,
    )
    rows = loss.new_empty(call.target_ids.shape)
    more = loss.new_empty(len(METRICS)) if options.objective == "srpo" else torch.empty_like(rows)
    return loss, rows, more, *ops.dense(gradients, loss), torch.empty_like(loss)


def _backward(scale: Callable[[Any, Tensor, Tensor, torch.dtype], Tensor], *, is_operator: bool) -> ops.Backward:
    """The backward in which ``scale`` multiplies a gradient by the upstream one, and hands it over in a dtype."""

    def backward(ctx: Any, saved: tuple[Tensor, ...], grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        gradients: list[Any] = [None] * ctx.num_arguments
        if is_operator:
            # A list of tensors has a list of gradients.
            for index, length in ctx.lists.items():
                gradients[index] = [None] * length
        if grad_loss is None:
            return tuple(gradients)
        if grad_loss.numel() != 1:
            raise RuntimeError(f"the loss takes a scalar upstream gradient, got {list(grad_loss.shape)}")
        factor = grad_loss * saved[-1]
        for i, (gradient, dtype) in enumerate(zip(saved[1:-1], ctx.dtypes, strict=True)):
            if dtype is not None:
                gradients[i] = scale(ctx, gradient, factor, dtype)
        return tuple(gradients)

    return ops.once_differentiable(backward, source=0)


def _scale(_: Any, gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return (gradient * factor).to(dtype)


def _scale_(ctx: Any, gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """In place when nobody can ask for the gradient a second time."""
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return _scale(ctx, gradient, factor, dtype)
    # Triton's interpreter cuts off what bf16 has no room for.
    return rows_of("torch" if gradient.is_cpu else ctx.backend).scaled(gradient, factor, dtype)


class _FusedLoss(torch.autograd.Function):
    """The eager form. The backward of a graph is traced, and leaves to the compiler what is done in place."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _forward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, options, needs = parse(inputs, LossArguments, LossOptions, Needs)
        ctx.backend = options.backend
        ctx.num_arguments = len(inputs)
        ctx.lists = {index: len(x) for index, x in enumerate(call) if isinstance(x, list)}
        ctx.dtypes = [x.dtype if needed else None for x, needed in zip(call[:3], needs, strict=True)]
        ctx.save_for_backward(output[0], *output[3:])
        ctx.mark_non_differentiable(*output[1:])
        # Absent upstream gradients would be zeros in the shape of every output, dW included.
        ctx.set_materialize_grads(False)

    backward = staticmethod(_backward(_scale_, is_operator=False))


_operator = torch.library.custom_op(
    "srpo_kernels::fused_loss",
    ops.with_autograd(_forward),
    mutates_args=(),
    tags=ops.TAGS,
    schema=(
        "(Tensor hidden, Tensor weight, Tensor? bias, Tensor target_ids, Tensor? mask, Tensor? teacher_mask, "
        "Tensor? teacher_hidden, Tensor[] teacher_weights, Tensor[] teacher_biases, Tensor? teacher_head_ids, "
        "Tensor? teacher_topk_ids, Tensor? teacher_topk_log_probs, Tensor? support_ids, Tensor? sequence_ids, "
        "Tensor? token_count, Tensor? dw_log_mean, Tensor? sdpo_count, Tensor? sequence_count, Tensor[] inputs, "
        "str objective, str[] input_names, str config, bool whole_sequences, str backend, SymInt? workspace_bytes, "
        "str? vocab_parallel_group, str? sequence_parallel_group, "
        f"{ops.NEEDS}) "
        f"-> (Tensor loss, Tensor log_probs, Tensor more, {ops.GRADIENTS}, Tensor grad_scale)"
    ),
)
_operator.register_fake(_fake)
_operator.register_autograd(_backward(_scale, is_operator=True), setup_context=_FusedLoss.setup_context)
