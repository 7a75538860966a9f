"""Liger-Kernel (linkedin/Liger-Kernel)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import srpo_kernels as sk
from tools.peers.suites.grpo import Batch, Options, per_token, reduced
from tools.peers.suites.losses import BACKEND, cross_entropy, divergence_config, head_of, refuse, token_stats
from tools.peers.suites.suite import Suite


def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, ce_weight: Tensor | None = None,
    ignore_index: int = -100, lse_square_scale: float = 0.0, label_smoothing: float = 0.0, reduction: str = "mean",
    softcap: float | None = None, return_z_loss: bool = False, accum_dtype: object = None,
    use_token_scaling: bool = False, return_token_accuracy: bool = False, return_predicted_tokens: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    refuse("label smoothing", label_smoothing)
    refuse("the likeliest token is no statistic here", return_token_accuracy, return_predicted_tokens)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden, weight = (x.to(torch.get_autocast_dtype(hidden.device.type)) for x in (hidden, weight))
    loss, z_loss = cross_entropy(
        hidden, weight, target, bias=bias, class_weights=ce_weight, ignore_index=ignore_index,
        z_coefficient=lse_square_scale, reduction=reduction, softcap=softcap, by_probability=use_token_scaling,
    )  # fmt: skip
    dtype = hidden.dtype if reduction == "none" else loss.dtype
    return loss.to(dtype), z_loss.to(dtype) if return_z_loss else None, None, None


def _cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int = -100,
    lse_square_scale: float = 0.0, label_smoothing: float = 0.0, reduction: str = "mean", softcap: float | None = None,
    return_z_loss: bool = False, return_token_accuracy: bool = False, return_predicted_tokens: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    loss, z_loss, *others = _linear_cross_entropy(
        logits, head_of(logits), target, None, weight, ignore_index, lse_square_scale, label_smoothing, reduction,
        softcap, return_z_loss, None, False, return_token_accuracy, return_predicted_tokens,
    )  # fmt: skip
    return loss.to(logits.dtype), None if z_loss is None else z_loss.to(logits.dtype), *others


def _vocab_parallel_cross_entropy(
    logits: Tensor, target: Tensor, tp_group: Any, ignore_index: int, label_smoothing: float, *_: object
) -> Tensor:
    refuse("label smoothing", label_smoothing)
    return cross_entropy(logits, head_of(logits), target, ignore_index=ignore_index, reduction="none")[0]


def _scaled_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float = 1.0, ignore_index: int = -100,
    m_tiles_per_cluster: int = 1, return_entropy: bool = False,
) -> Any:  # fmt: skip
    stats = token_stats(hidden, weight, target, mask=target != ignore_index, temperature=temperature)
    return (-stats.log_probs, stats.entropy) if return_entropy else -stats.log_probs


def _linear_jsd(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor | None = None,
    beta: float = 0.5, ignore_index: int = -100, temperature: float = 1.0, accum_dtype: object = None,
) -> Tensor:  # fmt: skip
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, teacher_hidden, teacher_weight = (
            x.to(dtype) for x in (hidden, weight, teacher_hidden, teacher_weight)
        )
    mask = torch.ones(len(hidden), dtype=torch.bool) if labels is None else labels != ignore_index
    count = mask.sum().clamp_min(1)
    loss = sk.fused_loss(
        hidden, weight, torch.zeros(len(hidden), dtype=torch.int64), lambda rows: rows.divergence, mask=mask,
        teacher_hidden=teacher_hidden, teacher_weight=teacher_weight, config=divergence_config(beta, temperature),
        backend=BACKEND,
    ).loss  # fmt: skip
    return (loss / count).to(hidden.dtype)


def _distillation(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor,
    bias: Tensor | None = None, teacher_bias: Tensor | None = None, weight_hard_loss: float = 0.5,
    weight_soft_loss: float = 0.5, beta: float = 0.5, ignore_index: int = -100, temperature: float = 1.0,
    compiled: bool = True, chunk_size: int = 1024, return_soft_hard_loss: bool = False,
) -> Any:  # fmt: skip
    mask = labels != ignore_index
    count, ids = mask.sum().clamp_min(1), labels.masked_fill(~mask, 0)
    hard_too = temperature == 1.0 and not return_soft_hard_loss

    def objective(rows: sk.ObjectiveRows) -> Tensor:
        soft = weight_soft_loss * rows.divergence
        return soft - weight_hard_loss * rows.log_probs if hard_too else soft

    soft = sk.fused_loss(
        hidden, weight, ids, objective, mask=mask, bias=bias, teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight, teacher_bias=teacher_bias, config=divergence_config(beta, temperature),
        backend=BACKEND,
    ).loss / count  # fmt: skip
    if hard_too:
        return soft
    # Theirs has a temperature in the divergence alone: a pass of its own.
    hard = cross_entropy(hidden, weight, labels, bias=bias, ignore_index=ignore_index)[0]
    loss = soft + weight_hard_loss * hard
    return (loss, soft / weight_soft_loss, hard) if return_soft_hard_loss else loss


def _linear_grpo(
    hidden: Tensor, weight: Tensor, ids: Tensor, attention_mask: Tensor, advantages: Tensor, bias: Tensor | None = None,
    ref_log_probs: Tensor | None = None, old_log_probs: Tensor | None = None, ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None, ref_bias: Tensor | None = None, beta: float = 0.04, epsilon_low: float = 0.2,
    epsilon_high: float = 0.2, loss_type: str = "dapo", max_completion_length: int | None = None,
    importance_sampling_level: str = "token", sapo_temperature_pos: float = 1.0, sapo_temperature_neg: float = 1.05,
    temperature: float = 1.0, compiled: bool = True, use_ref_model: bool = True, chunk_size: int = 1,
    vllm_is_ratio: Tensor | None = None, delta: float | None = None, use_bias_correction_kl: bool = False,
    vespo_k_pos: float = 2.0, vespo_lambda_pos: float = 3.0, vespo_k_neg: float = 3.0, vespo_lambda_neg: float = 2.0,
    num_items_in_batch: Any = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    options = Options(
        loss_type=loss_type, beta=beta if use_ref_model else 0.0, epsilon_low=epsilon_low, epsilon_high=epsilon_high,
        importance_sampling_level=importance_sampling_level, temperature=float(temperature),
        sapo_temperature_pos=sapo_temperature_pos, sapo_temperature_neg=sapo_temperature_neg, delta=delta,
        use_bias_correction_kl=use_bias_correction_kl, max_completion_length=max_completion_length,
        vespo=(vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg),
    )  # fmt: skip
    mask = attention_mask.bool()
    if use_ref_model and ref_log_probs is None and ref_hidden is not None and ref_weight is not None:
        with torch.no_grad():
            ref_log_probs = token_stats(
                ref_hidden, ref_weight, ids, mask=mask, bias=ref_bias, temperature=options.temperature
            ).log_probs
    batch = Batch(
        hidden=hidden, weight=weight, bias=bias, ids=ids, mask=mask, advantages=advantages,
        old_log_probs=old_log_probs, ref_log_probs=ref_log_probs, is_weights=vllm_is_ratio,
    )  # fmt: skip
    loss, metrics = reduced(batch, options, num_items_in_batch)
    if beta and not options.beta:
        # Without a reference theirs is the KL to itself.
        metrics.insert(0, torch.zeros(()))
    return loss, tuple(metrics)


def _selected_log_probs(
    hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    return token_stats(hidden, weight, ids, bias=bias, temperature=temperature).log_probs


def _selected_of_logits(logits: Tensor, ids: Tensor, temperature: float = 0.9, mask: Tensor | None = None) -> Tensor:
    logits, ids = logits[:, :-1].detach(), ids[:, 1 - logits.shape[1] :]
    mask = None if mask is None else mask[:, -ids.shape[1] :].bool()
    return token_stats(logits, head_of(logits), ids, mask=mask, temperature=temperature).log_probs


def _grpo_of_logits(
    logits: Tensor, old_logp: Tensor | None, ref_logp: Tensor | None, ids: Tensor, advantages: Tensor,
    completion_mask: Tensor | None, temperature: float, beta: float, eps_low: float, eps_high: float, inplace: bool,
    loss_type: str = "grpo", max_completion_length: int | None = None, reduce: bool = True,
    importance_sampling_level: str = "token", sapo_temperature_pos: float = 1.0, sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Tensor | None = None, delta: float | None = None, use_bias_correction_kl: bool = False,
    num_items_in_batch: Any = None, phi_seq: Tensor | None = None,
) -> Any:  # fmt: skip
    hidden = logits[:, :-1]
    options = Options(
        loss_type=loss_type, beta=beta, epsilon_low=eps_low, epsilon_high=eps_high, delta=delta,
        importance_sampling_level=importance_sampling_level, temperature=temperature,
        sapo_temperature_pos=sapo_temperature_pos, sapo_temperature_neg=sapo_temperature_neg,
        use_bias_correction_kl=use_bias_correction_kl, max_completion_length=max_completion_length or ids.shape[1],
    )  # fmt: skip
    mask = torch.ones_like(ids, dtype=torch.bool) if completion_mask is None else completion_mask.bool()
    batch = Batch(
        hidden=hidden, weight=head_of(logits), bias=None, ids=ids, mask=mask, advantages=advantages,
        old_log_probs=old_logp, ref_log_probs=ref_logp if beta else None, is_weights=vllm_is_ratio,
    )  # fmt: skip
    if reduce and loss_type != "luspo":
        loss, metrics = reduced(batch, options, num_items_in_batch)
        return loss, metrics[0] if beta else None, metrics[-1]
    terms = per_token(batch, options)
    clipped = (terms.clip_low | terms.clip_high).float()
    if not reduce:
        return terms.loss, terms.ref_kl if beta else None, clipped
    # Times the length of the sequence, the KL term too.
    loss = (terms.loss * mask.sum(-1, keepdim=True)).mean()
    return loss, terms.ref_kl.sum() / mask.sum() if beta else None, clipped.sum() / mask.sum()


def _applied(function: Any) -> SimpleNamespace:
    """In the place of an autograd function."""
    return SimpleNamespace(apply=function)


def _prepare() -> None:
    # Their tests leave bf16 out on a CPU, and one asks how much memory it has.
    importlib.import_module("test.utils").supports_bfloat16 = lambda: True  # type: ignore[attr-defined]
    torch.cpu.get_device_properties = lambda *_: SimpleNamespace(total_memory=0)  # type: ignore[attr-defined]


def _shrink(parameters: Mapping[str, Any], smallest: bool, name: str) -> Mapping[str, Any]:
    """Tokens, and the vocabulary, whose square is the head of functions that take logits."""
    most = {"T": 16, "V": 96, "H": 32, "B": 3} if smallest else {"T": 48, "V": 512, "H": 128, "B": 8}
    if parameters.get("T") in (1024, 128) and "H" not in parameters:
        # The last 100 of them are masked.
        most["T"] = 112
    names = {"s": "T", "b": "B", "v": "V", "T": "T", "V": "V", "H": "H", "B": "B"}
    values = {key: min(parameters[key], most[names[key]]) for key in names if key in parameters}
    # This one's reference ignores no id: in a smaller vocabulary the one that is ignored would be drawn.
    return values | ({"ignore_index": -100} if "cross_entropy.py::test_correctness_with_forward_only" in name else {})


_TRANSFORMERS = "test/transformers/test_"
_CHUNKED = "test/chunked_loss/test_"
_SCALED = "test_fused_linear_scaled_cross_entropy:_FRONTEND."

SUITE = Suite(
    peer="Liger-Kernel",
    paths=("src", ".", "test/transformers"),
    tests=(
        *(f"{_TRANSFORMERS}{name}.py" for name in (
            "cross_entropy", "fused_linear_cross_entropy", "fused_linear_scaled_cross_entropy", "fused_linear_jsd",
            "grpo_loss", "jsd", "kl_div", "tvd",
        )),
        *(f"{_CHUNKED}{name}.py" for name in (
            "grpo_loss", "jsd_loss", "cosine_loss", "cpo_loss", "dpo_loss", "kto_loss", "orpo_loss", "simpo_loss",
        )),
        "test/megatron/test_cross_entropy.py",
    ),
    stand_ins={
        "liger_kernel.ops.cross_entropy:LigerCrossEntropyFunction": _applied(_cross_entropy),
        "liger_kernel.ops.fused_linear_cross_entropy:LigerFusedLinearCrossEntropyFunction":
            _applied(_linear_cross_entropy),
        "liger_kernel.ops.fused_linear_jsd:LigerFusedLinearJSDFunction": _applied(_linear_jsd),
        "liger_kernel.ops.grpo_loss:GrpoLossFunction": _applied(_grpo_of_logits),
        "liger_kernel.ops.grpo_loss:fused_selective_log_softmax": _selected_of_logits,
        "liger_kernel.ops.vocab_parallel_cross_entropy:LigerVocabParallelCEFunction":
            _applied(_vocab_parallel_cross_entropy),
        "liger_kernel.chunked_loss.grpo_loss:LigerFusedLinearGRPOFunction": _applied(_linear_grpo),
        "liger_kernel.chunked_loss.functional:liger_fused_linear_grpo": _linear_grpo,
        "liger_kernel.chunked_loss.fused_linear_ppo:LigerFusedLinearPPOBase.chunk_forward": _selected_log_probs,
        "liger_kernel.chunked_loss.jsd_loss:LigerFusedLinearJSDFunction": _applied(_distillation),
        "liger_kernel.chunked_loss.functional:liger_fused_linear_jsd": _distillation,
        f"{_SCALED}LigerFusedLinearScaledCrossEntropyFunction": _applied(_scaled_cross_entropy),
    },
    without=(
        (rf"{_TRANSFORMERS}(jsd|kl_div)", "log-probs as inputs, with gradients that no softmax passes"),
        (f"{_TRANSFORMERS}tvd", "the total variation of two distributions"),
        (f"{_CHUNKED}cosine_loss", "a distance of hidden states"),
        (rf"{_CHUNKED}(cpo|dpo|kto|orpo|simpo)_loss", "a preference loss"),
        (
            r"transformers/test_cross_entropy.py::test_correctness(_with_weight_once)?\[1.0-dtype0.*-(sum|none)-",
            "held to torch's own gradient of bf16 logits, itself as far from fp64 as the test allows",
        ),
        (r"out_of_bounds_target", "an id outside the vocabulary is an error"),
        (r"test_tp_vocab_parallel_ce_parity", "logits in shards: here the LM head is"),
        (r"scaled_cross_entropy.*test_(cutile|frontend_(uses|dispatches|is))", "which of their kernels is taken"),
        (r"test_reduce_grpo_loss", "a reduction of token losses alone"),
    ),
    shrink=_shrink,
    prepare=_prepare,
)  # fmt: skip
