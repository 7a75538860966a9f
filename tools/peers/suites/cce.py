"""cut-cross-entropy (apple/ml-cross-entropy)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

import srpo_kernels as sk
from tools.peers.suites.losses import BACKEND, cross_entropy, shifted, token_stats
from tools.peers.suites.suite import Suite


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    vocab_parallel_options: Any = None,
    **_: object,
) -> Any:
    """Of what it filters and accumulates, nothing changes the result here."""
    hidden, targets = shifted(e, targets, int(shift))
    if not return_lse and vocab_parallel_options is None:
        return cross_entropy(
            hidden, c, targets, bias=bias, ignore_index=ignore_index, softcap=softcap, reduction=reduction
        )[0]
    mask = targets != ignore_index
    group = None
    if vocab_parallel_options is not None:
        group = vocab_parallel_options.group or torch.distributed.group.WORLD
    stats = token_stats(
        hidden, c, targets.masked_fill(~mask, 0), mask=mask, bias=bias, softcap=softcap, vocab_parallel_group=group
    )
    losses = -stats.log_probs
    if reduction != "none":
        losses = losses.sum() / (mask.sum() if reduction == "mean" else 1)
    return (losses, stats.logsumexp) if return_lse else losses


def logsumexp(e: Tensor, c: Tensor, bias: Tensor | None = None, softcap: float | None = None) -> Tensor:
    """Their kernel of the forward."""
    return sk.teacher_stats(e, c, teacher_bias=bias, softcap=softcap, backend=BACKEND).logsumexp


def forked(function: Callable[..., None], args: tuple[Any, ...], nprocs: int, join: bool = True) -> None:
    """The processes of a test, which have ours too where they are forked."""

    def on_cpu(*arguments: Any) -> None:
        # They know what to do on a CPU, whose collectives are gloo's.
        torch.cuda.is_available = lambda: False
        function(*arguments)

    start_processes(on_cpu, args, nprocs, join, start_method="fork")


def shrink(parameters: Mapping[str, Any], smallest: bool, name: str) -> Mapping[str, Any]:
    """N, V and D of Triton's interpreter."""
    if not smallest or "shape" not in parameters:
        return {}
    n, v, d = parameters["shape"]
    return {"shape": (n // 8 // 4 * 4, v // 8, d // 8)}


SUITE = Suite(
    peer="cut-cross-entropy",
    paths=(".",),
    tests=(
        "tests/test_cce_loss_forward.py", "tests/test_cce_loss_backward.py", "tests/test_cce_lse.py",
        "tests/test_cce_indexed_dot.py", "tests/test_vocab_parallel.py", "tests/test_compute_z_loss.py",
    ),
    stand_ins={
        "cut_cross_entropy.linear_cross_entropy:linear_cross_entropy": linear_cross_entropy,
        "cut_cross_entropy.cce_lse_forward:cce_lse_forward_kernel": logsumexp,
        "torch.multiprocessing.spawn:spawn": forked,
    },
    without=(
        ("test_indexed_dot", "the target's logit alone: a statistic here is its log-prob"),
        ("test_compute_z_loss", "a function of log-sum-exps that the caller has"),
        ("test_partition_n_into_range", "how a vocabulary is cut into shards is the caller's"),
    ),
    shrink=shrink,
    asks_for_cuda=True,
)  # fmt: skip
