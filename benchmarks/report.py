"""From the committed CSV files to tables and pictures in the documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from benchmarks import device_reports, objectives, pictures, trainers
from benchmarks.options import Report
from benchmarks.results import describe_environment, read_csv
from benchmarks.scaling import exponents, points
from srpo_kernels.verify.kinds import HeadName, Workload
from srpo_kernels.verify.providers import REGISTRY
from tools.documents import markdown_table, replace_marked

_HEADS: tuple[HeadName, ...] = ("smollm2-135m", "qwen3-0.6b")
_WORKLOADS: tuple[Workload, ...] = ("policy", "jsd", "routed")
_ERRORS = {
    "loss_error": "loss",
    "log_probs_error": "log-probs (nats)",
    "grad_hidden_error": "dX",
    "grad_weight_error": "dW",
}
_CASE = ["head", "hidden_size", "vocab_size", "rows", "workload", "dtype", "softcap", "active"]


def report(options: Report) -> None:
    """What ``Report`` describes."""
    results, figures = options.results, options.docs / "figures"
    speed, accuracy, scaling = (read_csv(results / f"{name}.csv") for name in ("speed", "accuracy", "scaling"))
    main = speed[speed["head"].isin(_HEADS) & speed["workload"].isin(_WORKLOADS) & (speed["dtype"] == "float32")]
    main = _usual_share(main)
    heads = [head for head in _HEADS if (main["head"] == head).any()]
    workloads = [name for name in _WORKLOADS if (main["workload"] == name).any()]
    ratios = main[(main["metric"] == "ratio_to_bare") & (main["provider"] != "bare")].dropna(subset="median")
    pictures.save(pictures.speed(ratios, heads, workloads), figures, "speed")
    grown = points(scaling)
    of_rows = grown[(grown["axis"] == "rows") & (grown["metric"] == "peak_bytes")]
    if len(of_rows):
        pictures.save(pictures.memory(of_rows), figures, "memory")
    pictures.save(pictures.growth(grown), figures, "scaling")
    pictures.save(pictures.errors(accuracy, _ERRORS), figures, "accuracy")
    replace_marked(
        options.docs / "benchmarks.md",
        {
            "providers": _providers(speed),
            "speed": _speed(speed),
            "memory": _memory(speed),
            "memory:many-rows": _optional(results, "memory", _many_rows),
            "accuracy": _accuracy(accuracy),
            "scaling": _scaling(scaling),
            "trainers": _optional(results, "trainers", lambda cells: markdown_table(*trainers.table(cells))),
            "trainers:gpu": _optional(results, "trainers_gpu", lambda cells: markdown_table(*trainers.table(cells))),
            "objectives": _optional(results, "objectives", lambda cells: markdown_table(*objectives.table(cells))),
        },
    )
    replace_marked(
        options.docs / "gpu.md",
        {
            "report:gpu": device_reports.whole(results / "gpu.json"),
            "report": device_reports.whole(results / "small.json"),
        },
    )


def _optional(results: Path, name: str, write: Callable[[pd.DataFrame], str]) -> str:
    path = results / f"{name}.csv"
    return (
        write(read_csv(path))
        if path.exists()
        else f"Not measured yet: `python -m benchmarks {name.partition('_')[0]}`."
    )


def _usual_share(cells: pd.DataFrame) -> pd.DataFrame:
    """Without the routed batches whose share of active rows is not the usual one."""
    return cells[cells["active"] == cells["active"].mode()[0]]


def _providers(speed: pd.DataFrame) -> str:
    present = [name for name in REGISTRY if (speed["provider"] == name).any()]
    cells = pd.DataFrame({"provider": f"`{name}`", "what it is": REGISTRY[name].meaning} for name in present)
    return markdown_table(cells, f"Measured on {describe_environment(speed)}.")


def _speed(speed: pd.DataFrame) -> str:
    cells = _by_case(speed, "ratio_to_bare", lambda ratio, _: f"{ratio:.2f}")
    seconds = _by_case(speed[speed["provider"].isin(["bare"])], "seconds", lambda value, _: f"{value:.3g}")
    cells.insert(1, "bare, seconds", seconds["bare"])
    return markdown_table(
        cells.drop(columns="bare"),
        "Time of forward and backward as a multiple of the bare products, medians of ratios within a round; "
        "a reason stands where a provider has no number.",
    ) + _nowhere(speed)


def _memory(cells: pd.DataFrame) -> str:
    return markdown_table(
        _by_case(cells, "peak_bytes", _mebibytes),
        "Extra peak memory of one forward and backward in MiB, each in a process of its own, and as a multiple of this "
        "library's.",
    )


def _many_rows(memory: pd.DataFrame) -> str:
    return f"{_memory(memory)}\n\nMeasured on {describe_environment(memory)}."


def _mebibytes(size: float, ours: float) -> str:
    text = f"{size / 2**20:,.0f}"
    return text if math.isnan(ours) else f"{text} ({size / ours:.1f}×)"


def _accuracy(accuracy: pd.DataFrame) -> str:
    parts = []
    for metric, label in _ERRORS.items():
        chosen = accuracy[(accuracy["metric"] == metric) | accuracy["median"].isna()]
        cells = _by_case(chosen, metric, lambda error, _: f"{error:.1e}")
        cells = cells.loc[:, ~cells.apply(lambda column: column.isin(["-", ""]).all())]
        parts.append(markdown_table(cells, f"Error of {label}."))
    return "\n\n".join([f"Measured on {describe_environment(accuracy)}.", *parts])


def _scaling(scaling: pd.DataFrame) -> str:
    located = points(scaling)
    fits = exponents(located)
    table = fits.pivot_table(index=["axis", "metric"], columns="provider", values="exponent", sort=False).reset_index()
    table.columns.name = None
    text = table.map(lambda cell: cell if isinstance(cell, str) else "-" if pd.isna(cell) else f"{cell:.2f}")
    ranges = ", ".join(
        f"{axis} {min(group['x']):,g} to {max(group['x']):,g}" for axis, group in located.groupby("axis", sort=False)
    )
    head = scaling.iloc[0]["head"]
    return markdown_table(
        text,
        f"Exponents of a power law through the medians: routed batches on the head of {head}; {ranges}. "
        f"Measured on {describe_environment(scaling)}.",
    )


def _by_case(cells: pd.DataFrame, metric: str, show: Callable[[float, float], str]) -> pd.DataFrame:
    """A line per case, a column per provider: the number, or the reason why there is none.

    ``show`` is given the number and this library's, which is NaN where it has none and for its own.
    """
    keys = [name for name in _CASE if name in cells]
    numbers = cells[(cells["metric"] == metric) & cells["median"].notna()]
    providers = [name for name in dict.fromkeys(cells["provider"]) if (numbers["provider"] == name).any()]
    ordered = [name for name in REGISTRY if name in providers]
    rows = []
    for _, group in cells.groupby(keys, sort=False, dropna=False):
        row = {"case": _case_name(group.iloc[0])}
        found = group[(group["metric"] == metric) & group["median"].notna()].set_index("provider")["median"]
        reasons = group[group["reason"] != ""].drop_duplicates("provider").set_index("provider")["reason"]
        for provider in ordered:
            ours = math.nan if provider == "srpo_kernels" else found.get("srpo_kernels", math.nan)
            row[provider] = show(found[provider], ours) if provider in found else reasons.get(provider, "-")
        rows.append(row)
    return pd.DataFrame(rows)


def _case_name(row: pd.Series) -> str:
    parts = [
        f"{row['head']} ({row['hidden_size']:,} × {row['vocab_size']:,})",
        f"{row['rows']:,} rows",
        row["workload"],
    ]
    if row["workload"] == "routed":
        parts.append(f"{float(row['active']):.0%} active")
    if row["softcap"] not in ("", None) and not pd.isna(row["softcap"]):
        parts.append(f"softcap {float(row['softcap']):g}")
    return ", ".join([*parts, row["dtype"]])


def _nowhere(cells: pd.DataFrame) -> str:
    """Providers without a single number, and why."""
    ran = set(cells[cells["median"].notna()]["provider"])
    reasons: dict[str, Sequence[str]] = {
        name: sorted(set(group["reason"])) for name, group in cells.groupby("provider", sort=False) if name not in ran
    }
    if not reasons:
        return ""
    return (
        "\n\nWithout a number here: " + "; ".join(f"`{name}` ({', '.join(why)})" for name, why in reasons.items()) + "."
    )
