"""TRL (huggingface/trl)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor

import srpo_kernels as sk
from tools.peers.suites.losses import BACKEND, cross_entropy, divergence_config, head_of, shifted, token_stats
from tools.peers.suites.suite import Suite, no_counterpart


def _fp32(logits: Tensor) -> None:
    if logits.dtype in (torch.float16, torch.bfloat16):
        no_counterpart("results in half precision, equal to the last bit")


def _entropy(logits: Tensor, chunk_size: int = 128) -> Tensor:
    _fp32(logits)
    rows = logits.reshape(-1, logits.shape[-1])
    return sk.teacher_stats(rows, head_of(rows), backend=BACKEND).entropy.view(logits.shape[:-1])


def _log_probs(logits: Tensor, index: Tensor) -> Tensor:
    _fp32(logits)
    if index.dim() == logits.dim():
        logits = logits.unsqueeze(-2).expand(*index.shape, logits.shape[-1])
    return token_stats(logits, head_of(logits), index).log_probs


def _chunked_log_probs(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    stats = token_stats(hidden, weight, labels, temperature=temperature)
    return stats.log_probs, stats.entropy


def _jsd(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, beta: float = 0.5,
    temperature: float = 1.0, reduction: str = "batchmean", *others: Any, num_items_in_batch: Any = None, **top: Any,
) -> Tensor:  # fmt: skip
    if reduction in ("none", "mean"):
        no_counterpart("a divergence for each token of the vocabulary")
    if others or top.get("top_k"):
        no_counterpart("a divergence over a support alone is a loss here, not a statistic")
    ids = torch.zeros(student_logits.shape[:-1], dtype=torch.int64)
    mask = torch.ones_like(ids, dtype=torch.bool) if labels is None else labels != -100
    loss = sk.fused_loss(
        student_logits, head_of(student_logits), ids, lambda rows: rows.divergence, mask=mask,
        teacher_hidden=teacher_logits, config=divergence_config(beta, temperature), backend=BACKEND,
    ).loss  # fmt: skip
    if reduction == "sum":
        return loss
    count = len(student_logits) if labels is None else mask.sum().clamp_min(1)
    average: Tensor = loss / (count if num_items_in_batch is None else num_items_in_batch)
    return average


def _dft(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits, labels = shifted(outputs.logits, labels, 1)
    loss, _ = cross_entropy(logits, head_of(logits), labels, reduction="sum", by_probability=True)
    return loss / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


class _Missing:
    """In the place of a number that this library does not compute: a test that looks at it has no counterpart."""

    def __getattr__(self, name: str) -> NoReturn:
        no_counterpart("the likeliest token is no statistic here")

    def __truediv__(self, other: object) -> NoReturn:
        no_counterpart("the likeliest token is no statistic here")


def _chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, chunk_size: int, labels: Tensor | None = None, shift_labels: Tensor | None = None,
    num_items_in_batch: Any = None, logit_scale: float = 1.0, final_logit_softcapping: float | None = None,
    lm_head_bias: Tensor | None = None,
) -> tuple[Tensor, _Missing, Tensor, Tensor]:  # fmt: skip
    if shift_labels is None:
        if labels is None:
            raise ValueError("At least one of labels and shift_labels is needed")
        hidden, shift_labels = shifted(hidden, labels, 1)
    mask = shift_labels != -100
    stats = token_stats(
        hidden, weight, shift_labels, mask=mask, bias=lm_head_bias, logit_scale=logit_scale,
        softcap=final_logit_softcapping,
    )  # fmt: skip
    count = mask.sum()
    loss = -stats.log_probs.sum() / (count.clamp_min(1) if num_items_in_batch is None else num_items_in_batch)
    return loss, _Missing(), stats.entropy.detach().sum(), count


_TRAINERS = {"gkd": "GKDTrainer", "distillation": "DistillationTrainer", "iw_opd": "IWOPDTrainer"}

SUITE = Suite(
    peer="TRL",
    paths=(".",),
    # Whole trainers need models of a hub: what they compute by ours is in tests/integrations.
    tests=(
        "tests/test_utils.py::TestEntropyFromLogits", "tests/test_utils.py::TestSelectiveLogSoftmax",
        "tests/test_utils.py::TestChunkedLogProbFunction", "tests/test_sft_trainer.py::TestDFTLoss",
        "tests/test_sft_trainer.py::TestChunkedCrossEntropyLoss",
        "tests/experimental/test_distillation_trainer.py::TestGeneralizedJSDLossIsPinned",
        *(f"tests/experimental/test_{name}_trainer.py::TestGeneralizedJSDLoss" for name in _TRAINERS),
    ),
    stand_ins={
        "trl.trainer.utils:entropy_from_logits": _entropy,
        "trl.trainer.utils:selective_log_softmax": _log_probs,
        "trl.trainer.utils:_ChunkedLogProbFunction": SimpleNamespace(apply=_chunked_log_probs),
        "trl.trainer.sft_trainer:dft_loss": _dft,
        "trl.trainer.sft_trainer:_chunked_cross_entropy_loss": _chunked_cross_entropy,
        **{
            f"trl.experimental.{name}.{name}_trainer:{trainer}.generalized_jsd_loss": staticmethod(_jsd)
            for name, trainer in _TRAINERS.items()
        },
    },
    without=(
        ("test_symmetry", "the same to the last bit where both models change places"),
        ("test_shift_labels_matches_labels", "the likeliest token is no statistic here"),
        ("TestChunkedLogProbFunction::test_backward_bfloat16", "held to logits in bf16: here they are in fp32"),
    ),
)  # fmt: skip
