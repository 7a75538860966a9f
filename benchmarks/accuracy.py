"""How far every provider is from the fp64 oracle."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import reference
from benchmarks.options import Accuracy
from benchmarks.results import Measurement, ResultsFile, resolve_device, resolve_threads, single
from srpo_kernels.verify.agreement import relative_error
from srpo_kernels.verify.batches import Batch, Case, make_batch
from srpo_kernels.verify.kinds import ProviderName
from srpo_kernels.verify.providers import REGISTRY, Result, Unsupported, prepare
from tools.documents import print_table

METRICS = ("loss_error", "log_probs_error", "grad_hidden_error", "grad_weight_error")


def accuracy(options: Accuracy) -> None:
    """What ``Accuracy`` describes."""
    threads = resolve_threads(options.threads)
    where = resolve_device(options.device)
    console = Console()
    file = ResultsFile(options.out, where, threads, resume=options.resume)
    cases = [
        Case(options.head, workload, options.rows, dtype) for dtype in options.dtypes for workload in options.workloads
    ]
    for case in file.missing(cases):
        with console.status(case.name):
            cells = list(_measure(case, options.providers, where))
        file.add(cells)
        print_table(console, _table(case, cells))


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
