"""The compile gate: every kernel as the engine launches it, compiled without a GPU and held to rules."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from rich.console import Console
from rich.progress import track

from tools.documents import markdown_table, print_table, replace_marked, rich_table
from tools.gate.targets import ENTRIES_ISSUE_RATIO, ISSUE_RATIO, SOFTCAP_ISSUE_RATIO, TARGETS, TargetName

if TYPE_CHECKING:
    from srpo_kernels.kernels.variants import Variant
    from tools.gate.__main__ import Options
    from tools.gate.rules import Line


def gate(options: Options) -> None:
    """Compile, print and write what was asked for; exits with 1 where a rule is broken or a target left out."""
    measured, left_out = _compile_all(options.targets, options.kernels, options.jobs)
    # On standard error before anything else: where no target is left there is nothing else.
    for name, reason in left_out.items():
        print(f"{name} is left out: {reason}", file=sys.stderr)
    if len(left_out) == len(options.targets):
        raise SystemExit(1)
    lines = pd.DataFrame([asdict(line) for line in measured])
    if lines.empty:
        raise SystemExit(f"no kernel is named {', '.join(options.kernels)}")
    if options.csv is not None:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        lines.to_csv(options.csv, index=False, float_format="%.4g")
    if options.docs is not None:
        write_tables(options.docs, lines)
    console = Console()
    for title, (table, caption) in tables(lines).items():
        print_table(console, rich_table(table, title, caption))
    broken = lines[lines["broken"] != ""]
    for line in broken.itertuples():
        console.print(f"[red]{line.kernel}, {line.label}, {line.target}: {line.broken}")
    console.print(f"{len(lines)} compiled, {len(broken)} with broken rules; targets left out: {len(left_out)}")
    if len(broken) or left_out:
        raise SystemExit(1)


def _compile_all(
    targets: Sequence[TargetName], kernels: Sequence[str], jobs: int
) -> tuple[list[Line], dict[TargetName, str]]:
    """All lines, in the order of the targets and their variants, and the targets that are left out with the reason."""
    # The interpreter's kernels are no source for a compiler: processes that start from here do not have it.
    os.environ.pop("TRITON_INTERPRET", None)
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        missing = dict(zip(targets, pool.map(_what_is_missing, targets), strict=True))
        present = [name for name in targets if missing[name] is None]
        counts = pool.map(_count, present)
        tasks = [(name, index) for name, count in zip(present, counts, strict=True) for index in range(count)]
        futures = {pool.submit(_compile, *task, kernels): task for task in tasks}
        console = Console(stderr=True)
        done = track(as_completed(futures), "compiling", len(futures), console=console, disable=not console.is_terminal)
        lines = {futures[future]: future.result() for future in done}
    left_out = {name: reason for name, reason in missing.items() if reason is not None}
    return [line for task in tasks if (line := lines[task]) is not None], left_out


# The processes below are the only ones to load Triton, and without the interpreter.
@cache
def _variants(name: TargetName) -> list[Variant]:
    from triton.backends.compiler import GPUTarget

    from srpo_kernels.kernels.variants import variants

    target = TARGETS[name]
    return list(variants(GPUTarget(target.backend, target.arch, target.warp_size)))


def _what_is_missing(name: TargetName) -> str | None:
    from tools.gate.rules import what_is_missing

    return what_is_missing(TARGETS[name])


def _count(name: TargetName) -> int:
    return len(_variants(name))


def _compile(name: TargetName, index: int, kernels: Sequence[str]) -> Line | None:
    from tools.gate.rules import measure

    variant = _variants(name)[index]
    return measure(variant, TARGETS[name]) if not kernels or variant.kernel in kernels else None


_RESOURCES = (
    "Registers of a thread, blocks on a multiprocessor and the share of its warps that they are; with a dot the "
    "instruction that it became and the shared memory of a block."
)
_ROOFLINE = (
    "Instructions per vocabulary element: fp32 + integer, compare and select + special functions, of all. Then time "
    f"in the busiest pipe over time in the memory, by data-sheet rates: at most {ISSUE_RATIO}, with a softcap "
    f"{SOFTCAP_ISSUE_RATIO}, for a divergence of each row's own {ENTRIES_ISSUE_RATIO}."
)


def tables(lines: pd.DataFrame) -> dict[str, tuple[pd.DataFrame, str]]:
    """The tables of resources and of the roofline, each with what its cells say; broken rules are in the first."""
    keys = ["kernel", "label"]
    resources = _pivot(lines.assign(cell=[_resources(line) for line in lines.itertuples()]), keys, "target")
    counted = lines[lines["issue_ratio"].notna()]
    roofline = _pivot(
        counted.assign(cell=[_roofline(line) for line in counted.itertuples()], bytes=counted["bytes_per_element"]),
        [*keys, "bytes"],
        "device",
    )
    return {"resources": (resources, _RESOURCES), "roofline": (roofline, _ROOFLINE)}


def write_tables(document: Path, lines: pd.DataFrame) -> None:
    """Put both tables between their markers, of the targets that have a data sheet: all would not fit a page."""
    lines = lines[[TARGETS[name].device is not None for name in lines["target"]]]
    replace_marked(document, {f"gate:{name}": markdown_table(*table) for name, table in tables(lines).items()})


def _pivot(cells: pd.DataFrame, keys: list[str], column: str) -> pd.DataFrame:
    """A column of cells for each value of ``column``, both in the order in which they come."""
    wide = cells.pivot(index=keys, columns=column, values="cell")
    order = cells[keys].drop_duplicates()
    return wide.reindex(pd.MultiIndex.from_frame(order), columns=cells[column].unique()).fillna("").reset_index()


def _resources(line: Line) -> str:
    parts = [f"{line.registers}, {line.blocks} × {line.num_warps}, {line.occupancy:.0%}"]
    if not line.bytes_per_element:
        parts.append(f"{line.tensor_core}, {line.shared_bytes / 1024:.0f} KiB")
    return "; ".join([*parts, f"BROKEN: {line.broken}"] if line.broken else parts)


def _roofline(line: Line) -> str:
    parts = " + ".join(f"{count:.1f}" for count in (line.fp32, line.alu, line.special))
    return f"{parts} of {line.total:.1f}; {line.issue_ratio:.2f} {line.pipe}"
