"""A loss of one's own: through ``fused_loss``, through ``token_stats``, and with full logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pandas as pd
import torch
from rich.console import Console

from benchmarks import tables
from benchmarks.measure import measure, rows_of
from benchmarks.memory import measure_peak
from benchmarks.options import Loss, Objectives, Way
from benchmarks.own_losses import LOSSES, WAYS, with_full_logits
from benchmarks.processes import fresh_peak
from benchmarks.results import Measurement, ResultsFile, describe_environment, read_csv, resolve_device, resolve_threads
from srpo_kernels.verify import providers
from srpo_kernels.verify.agreement import Errors, relative_error
from srpo_kernels.verify.batches import Batch, Case
from srpo_kernels.verify.kinds import OwnWorkload, Workload
from srpo_kernels.verify.providers import Result, Step, Unsupported, autograd_step, naive
from srpo_kernels.verify.providers.naive_compiled import require_compiler
from srpo_kernels.verify.rounds import Rounds
from tools.documents import print_table, rich_table

# The kind of batch: policy rows, or rows that all have a teacher.
_WORKLOADS: dict[Loss, Workload | OwnWorkload] = {
    "grpo": "policy",
    "own": "jsd",
    "ratio-mask": "ratio_mask",
    "certainty": "certainty",
    "topk-teacher": "topk_teacher",
    "support": "support",
}
# In buffers of the logits' size, at the peak.
_COMPILED, _EXACT = naive.Buffers(4, 6), naive.Buffers(10, 26)


def objectives(options: Objectives) -> None:
    """What ``Objectives`` describes."""
    if options.rounds < 1:
        raise SystemExit(f"rounds must be >= 1, got {options.rounds}")
    threads = resolve_threads(options.threads)
    where = resolve_device(options.device)
    console = Console()
    file = ResultsFile(options.out, where, threads, resume=options.resume)
    cases = [
        Case(head, _WORKLOADS[loss], rows_of(head, where, options.rows))
        for head in options.heads
        for loss in options.losses
    ]
    rounds = Rounds(options.rounds, options.budget)
    for case in file.missing(cases):
        peaks = partial(_peak, case, device=where, threads=threads) if options.memory else None
        found = measure(case, options.ways, rounds, where, console, prepare=prepare, compare=_errors, peaks=peaks)
        cells = list(found)
        file.add(cells)
        print_table(console, tables.case_table(case, cells, "full logits in fp64"))
    print_table(console, rich_table(*_titled(read_csv(options.out))))


def prepare(way: str, batch: Batch) -> Step:
    """The step of one way on one batch. Raises Unsupported where it cannot do it."""
    if way == "bare":
        return providers.prepare("bare", batch)
    if way == "srpo_loss" and batch.workload not in ("policy", "support"):
        raise Unsupported("GRPO alone")
    if way == "token_stats" and batch.workload == "certainty":
        raise Unsupported("one divergence a call")
    loss = WAYS[way]
    if way == "naive":
        naive.require_memory(batch)
    if way == "naive-compiled":
        require_compiler(batch)
        naive.require_memory(batch, _COMPILED)
        torch._dynamo.reset()
        loss = torch.compile(loss)
    return autograd_step(lambda batch: (loss(batch), None), batch)


def table(cells: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The numbers of ``objectives.csv``, a line per case, and what they are."""
    lines = []
    for _, group in cells.groupby(["head", "workload", "rows"], sort=False):
        first, numbers = group.iloc[0], group.set_index(["provider", "metric"])["median"]
        reasons = group[group["reason"] != ""].drop_duplicates("provider").set_index("provider")["reason"]
        head = f"{first['head']} ({first['hidden_size']:,} × {first['vocab_size']:,}), {first['rows']:,} rows"
        line = {"loss": LOSSES[first["workload"]].meaning, "head": head}
        if ("bare", "seconds") in numbers:
            line["bare, seconds"] = f"{numbers['bare', 'seconds']:.3g}"
        for way in WAYS:
            parts = [
                f"{numbers[way, metric] / unit:{form}}"
                for metric, unit, form in (("ratio_to_bare", 1.0, ".2f"), ("peak_bytes", 2.0**20, ",.0f"))
                if (way, metric) in numbers and not pd.isna(numbers[way, metric])
            ]
            line[way] = " / ".join(parts) or reasons.get(way, "-")
        lines.append(line)
    errors = cells[cells["metric"] == "grad_weight_difference"].groupby("provider", sort=False)["median"].max()
    worst = ", ".join(f"`{way}` {error:.1e}" for way, error in errors.items())
    caption = (
        "Time of forward and backward as a multiple of the bare products / extra peak memory in MiB, fp32, medians. "
        f"Largest relative error of dW from fp64: {worst}. Measured on {describe_environment(cells)}."
    )
    return pd.DataFrame(lines), caption


def _titled(cells: pd.DataFrame) -> tuple[pd.DataFrame, str, str]:
    lines, caption = table(cells)
    return lines, "a loss of one's own", caption


def _peak(case: Case, way: Way, device: torch.device, threads: int) -> Iterator[Measurement[Case]]:
    return fresh_peak(case, way, measure_peak, case, way, device, threads, prepare)


def _errors(steps: dict[Way, Step], batch: Batch, tolerance: float) -> dict[Way, Errors]:
    """Run every step once, which also warms it up, and compare it with full logits in fp64; {} where these do not fit.

    RuntimeError where they differ by more than ``tolerance``.
    """
    try:
        exact = _exact(batch)
    except Unsupported:
        exact = None
    errors: dict[Way, Errors] = {}
    for way, step in steps.items():
        result = step()
        if way == "bare" or exact is None:
            continue
        errors[way] = Errors(*map(relative_error, result[:3], exact[:3]))
        if not all(error < tolerance for error in errors[way]):
            raise RuntimeError(f"{way} does not compute the same loss and gradients: {errors[way]}")
    return errors


def _exact(batch: Batch) -> Result:
    """Of full logits in fp64, rounded to fp32 once it is there: far below any error that is measured."""
    naive.require_memory(batch, _EXACT, beside=2 * 8 * batch.weight.numel())
    leaves = [x.detach().double().requires_grad_() for x in (batch.hidden, batch.weight)]
    wide = replace(
        batch,
        hidden=leaves[0],
        weight=leaves[1],
        teacher_hidden=batch.teacher_hidden.double(),
        old_log_probs=batch.old_log_probs.double(),
        topk_log_probs=None if batch.topk_log_probs is None else batch.topk_log_probs.double(),
        advantages=batch.advantages.double(),
    )
    loss = with_full_logits(wide)
    gradients = torch.autograd.grad(loss, leaves)
    return Result(loss.detach().float(), gradients[0].float(), gradients[1].float(), None)
