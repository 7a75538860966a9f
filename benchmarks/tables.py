"""The tables that a person reads in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from benchmarks.cases import Case, HeadName, Workload
from benchmarks.results import Measurement
from benchmarks.timing import Quantiles

# What srpo_kernels may take at most, as a multiple of bare products.
GOALS: dict[tuple[HeadName, Workload], float] = {
    ("qwen3-0.6b", "policy"): 1.08,
    ("qwen3-0.6b", "distillation"): 1.15,
    ("qwen3-0.6b", "routed"): 1.15,
    ("smollm2-135m", "policy"): 1.10,
    ("smollm2-135m", "distillation"): 1.35,
    ("smollm2-135m", "routed"): 1.25,
}

_MISSING = "-"


def case_table(case: Case, measurements: Sequence[Measurement]) -> Table:
    """Every provider on one case."""
    hidden_size, vocab_size, rows = case.shape
    table = Table(
        title=f"{case.head}, {case.workload}: H = {hidden_size:,}, V = {vocab_size:,}, {rows:,} rows",
        caption="median (p20-p80); errors are relative to the provider that shows none",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("provider", no_wrap=True)
    for name in ("seconds", "x bare", "peak MiB", "limit", "loss err", "dX err", "dW err"):
        table.add_column(name, justify="right", no_wrap=True)
    for m in measurements:
        errors = [_MISSING] * 3 if m.errors is None else [f"{error:.1e}" for error in m.errors]
        table.add_row(
            m.provider,
            _spread(m.seconds, ".3g"),
            _spread(m.ratio_to_bare, ".2f"),
            _mebibytes(m.peak_bytes),
            _mebibytes(m.peak_limit_bytes),
            *errors,
        )
    return table


def ratio_table(measurements: Sequence[Measurement]) -> Table:
    """Time over bare products: a line per kind of batch and provider, a column per head."""
    heads = list(dict.fromkeys(m.case.head for m in measurements))
    table = Table("batch", "provider", title="time as a multiple of bare products", box=box.SIMPLE_HEAD)
    for head in heads:
        table.add_column(head, justify="right")
    cells = {(m.case.workload, m.provider, m.case.head): _ratio(m) for m in measurements if m.provider != "bare"}
    for workload, provider in dict.fromkeys(key[:2] for key in cells):
        table.add_row(workload, provider, *(cells[workload, provider, head] for head in heads))
    return table


def _ratio(m: Measurement) -> str:
    if m.ratio_to_bare is None:
        return _MISSING
    ratio = f"{m.ratio_to_bare.median:.2f}"
    goal = GOALS.get((m.case.head, m.case.workload)) if m.provider == "srpo_kernels" else None
    return ratio if goal is None else f"{ratio} (goal {goal:.2f})"


def _spread(values: Quantiles | None, form: str) -> str:
    if values is None:
        return _MISSING
    return f"{values.median:{form}} ({values.p20:{form}}-{values.p80:{form}})"


def _mebibytes(size: float | None) -> str:
    return _MISSING if size is None else f"{size / 2**20:,.0f}"
