"""The tables that a person reads in the terminal while measurements run."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from benchmarks.results import Measurement
from srpo_kernels.verify.batches import Case
from srpo_kernels.verify.kinds import HeadName
from srpo_kernels.verify.rounds import Quantiles

# What srpo_kernels should take at most on a CPU in fp32, as a multiple of bare products.
GOALS: dict[tuple[HeadName, str], float] = {
    ("qwen3-0.6b", "policy"): 1.05,
    ("qwen3-0.6b", "jsd"): 1.10,
    ("qwen3-0.6b", "routed"): 1.10,
    ("smollm2-135m", "policy"): 1.05,
    ("smollm2-135m", "jsd"): 1.25,
    ("smollm2-135m", "routed"): 1.15,
}

_MISSING = "-"


def case_table(case: Case, measurements: Sequence[Measurement[Case]], truth: str = "the naive loss") -> Table:
    """Every provider on one case; without the columns that nothing stands in. Differences are from ``truth``."""
    lines: list[dict[str, str]] = []
    for provider in dict.fromkeys(m.provider for m in measurements):
        mine = {m.metric: m for m in measurements if m.provider == provider}
        values = {metric: m.values for metric, m in mine.items()}
        lines.append(
            {
                "provider": provider,
                "seconds": _spread(values.get("seconds"), ".3g"),
                "x bare": _spread(values.get("ratio_to_bare"), ".2f"),
                "peak MiB": _mebibytes(values.get("peak_bytes")),
                "limit": _mebibytes(values.get("peak_limit_bytes")),
                "loss": _median(values.get("loss_difference"), ".1e"),
                "dX": _median(values.get("grad_hidden_difference"), ".1e"),
                "dW": _median(values.get("grad_weight_difference"), ".1e"),
                "reason": ", ".join(m.reason for m in mine.values() if m.reason),
            }
        )
    table = Table(
        title=f"{case.name}: H = {case.hidden_size:,}, V = {case.vocabulary:,}, {case.rows:,} rows",
        caption=f"median (p20-p80); differences of loss, dX and dW are from {truth}",
        box=box.SIMPLE_HEAD,
    )
    columns = [name for name in lines[0] if any(line[name] not in ("", _MISSING) for line in lines)]
    for name in columns:
        table.add_column(name, justify="left" if name in ("provider", "reason") else "right", no_wrap=name != "reason")
    for line in lines:
        table.add_row(*(line[name] for name in columns))
    return table


def ratio_table(measurements: Sequence[Measurement[Case]]) -> Table:
    """Time over bare products: a line per case, a column per provider."""
    ratios = {(m.case, m.provider): m.values for m in measurements if m.metric == "ratio_to_bare"}
    providers = [name for name in dict.fromkeys(key[1] for key in ratios) if name != "bare"]
    table = Table("case", "goal", title="time as a multiple of bare products", box=box.SIMPLE_HEAD)
    for provider in providers:
        table.add_column(provider, justify="right")
    for case in dict.fromkeys(key[0] for key in ratios):
        goal = GOALS.get((case.head, case.workload)) if case.dtype == "float32" else None
        cells = [_median(ratios.get((case, provider)), ".2f") for provider in providers]
        table.add_row(case.name, _MISSING if goal is None else f"{goal:.2f}", *cells)
    return table


def _spread(values: Quantiles | None, form: str) -> str:
    if values is None:
        return _MISSING
    return f"{values.median:{form}} ({values.p20:{form}}-{values.p80:{form}})"


def _median(values: Quantiles | None, form: str) -> str:
    return _MISSING if values is None else f"{values.median:{form}}"


def _mebibytes(values: Quantiles | None) -> str:
    return _MISSING if values is None else f"{values.median / 2**20:,.0f}"
