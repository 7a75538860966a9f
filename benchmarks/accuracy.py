"""How far every provider is from the fp64 oracle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from rich import box
from rich.table import Table

import reference
from benchmarks import tables
from benchmarks.results import RESULTS, Measurement, ResultsFile, resolve_device, single
from srpo_kernels.verify.agreement import relative_error
from srpo_kernels.verify.batches import DTYPES, Batch, Case, DtypeName, HeadName, Workload, make_batch
from srpo_kernels.verify.providers import COMPARED, REGISTRY, ProviderName, Result, Unsupported, prepare

METRICS = ("loss_error", "log_probs_error", "grad_hidden_error", "grad_weight_error")


def accuracy(
    head: HeadName = "smollm2-135m",
    workloads: tuple[Workload, ...] = ("policy", "jsd", "forward_kl", "reverse_kl", "routed"),
    dtypes: tuple[DtypeName, ...] = tuple(DTYPES),
    providers: tuple[ProviderName, ...] = COMPARED,
    rows: int = 256,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    out: Path = RESULTS / "accuracy.csv",
) -> None:
    """Error of loss, log-probs, dX and dW against the fp64 oracle in `reference/`, for every provider.

    The oracle gets the same inputs, rounded to the dtype, in fp64. Errors of loss and gradients are relative in the
    Euclidean norm, those of log-probs are the largest absolute one, in nats. A provider without weights for distilled
    tokens is held to the oracle without them.

    Args:
        head: LM head by the model it is of.
        workloads: kinds of batches.
        dtypes: of hidden states and head.
        providers: what to compare.
        rows: positions of a batch, padding included, a multiple of 32; the oracle holds all logits in fp64.
        device: auto is a GPU where there is one.
        out: CSV file to write; one that is there is replaced.
    """
    where = resolve_device(device)
    console = tables.console()
    file = ResultsFile(out, where, torch.get_num_threads())
    for dtype in dtypes:
        for workload in workloads:
            case = Case(head, workload, rows, dtype)
            with console.status(case.name):
                cells = list(_measure(case, providers, where))
            file.add(cells)
            console.print(_table(case, cells))


def _measure(case: Case, providers: tuple[ProviderName, ...], device: torch.device) -> Iterator[Measurement[Case]]:
    batch = make_batch(case, device)
    truths = {True: _oracle(batch)}
    if batch.distills:
        truths[False] = _oracle(batch.unweighted())
    for provider in providers:
        try:
            result = prepare(provider, batch)()
        except Unsupported as reason:
            yield Measurement(case, provider, METRICS[0], None, str(reason))
            continue
        truth = truths[REGISTRY[provider].weighted or not batch.distills]
        for metric, error in _errors(result, truth).items():
            yield Measurement(case, provider, metric, single(error))


def _oracle(batch: Batch) -> Result:
    hidden, weight = (x.detach().double().requires_grad_() for x in (batch.hidden, batch.weight))
    out = reference.srpo_loss(
        hidden,
        weight,
        batch.target_ids,
        advantages=batch.advantages.double(),
        mask=batch.mask,
        sdpo_mask=batch.sdpo_mask if batch.distills else None,
        teacher_hidden=batch.teacher_hidden.double() if batch.distills else None,
        old_log_probs=batch.old_log_probs.double(),
        config=batch.config,
    )
    grad_hidden, grad_weight = torch.autograd.grad(out.loss, [hidden, weight])
    return Result(out.loss.detach(), grad_hidden, grad_weight, out.log_probs)


def _errors(result: Result, truth: Result) -> dict[str, float]:
    errors = dict(
        zip(
            ("loss_error", "grad_hidden_error", "grad_weight_error"),
            map(relative_error, result[:3], truth[:3]),
            strict=True,
        )
    )
    if result.log_probs is not None and truth.log_probs is not None:
        both = (result.log_probs != 0) & (truth.log_probs != 0)
        if both.any():
            errors["log_probs_error"] = float((result.log_probs - truth.log_probs)[both].abs().max())
    return errors


def _table(case: Case, measurements: list[Measurement[Case]]) -> Table:
    table = Table(title=f"{case.name}: {case.rows} rows", box=box.SIMPLE_HEAD)
    for name in ("provider", "loss", "log-probs (nats)", "dX", "dW", "reason"):
        table.add_column(name)
    for provider in dict.fromkeys(m.provider for m in measurements):
        mine = {m.metric: m for m in measurements if m.provider == provider}
        cells = [mine[metric].values if metric in mine else None for metric in METRICS]
        reason = mine[METRICS[0]].reason
        table.add_row(provider, *("-" if x is None else f"{x.median:.1e}" for x in cells), reason)
    return table
