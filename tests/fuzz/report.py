"""What a run found, as text."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.fuzz.judge import Finding

# Options of the summary: those that failures have in common more than chance would have it.
_MOST_OPTIONS = 15
_LEAST_CASES = 10


@dataclass(frozen=True)
class Outcome:
    """One case: its options and what was found of each quantity."""

    seed: int
    options: dict[str, Any]
    findings: list[Finding]

    @property
    def passed(self) -> bool:
        return all(finding.passed for finding in self.findings)


def print_case(console: Console, outcome: Outcome) -> None:
    """The seed, the options and what is wrong."""
    console.print(f"[bold]{'ok' if outcome.passed else 'FAILED'}[/bold] --only {outcome.seed}: {outcome.options}")
    for finding in sorted(outcome.findings, key=lambda finding: -finding.ratio):
        if not finding.passed or outcome.passed:
            words = finding.reason or f"off by {finding.error:.3g}, allowed {finding.allowed:.3g}"
            console.print(f"    {finding.quantity}: {words}", markup=False)


def print_summary(console: Console, outcomes: list[Outcome], backend: str, seconds: float) -> None:
    """Cases and failures, by quantity and by option."""
    quantities: dict[str, list[tuple[int, Finding]]] = defaultdict(list)
    for outcome in outcomes:
        for finding in outcome.findings:
            quantities[f"{outcome.options['operation']}: {finding.quantity}"].append((outcome.seed, finding))
    table = Table("quantity", "cases", "failures", "worst error / allowed", "its seed", title="Quantities")
    for name, found in sorted(quantities.items()):
        seed, worst = max(found, key=lambda pair: pair[1].ratio)
        failures = sum(not finding.passed for _, finding in found)
        style = "red" if failures else None
        table.add_row(name, str(len(found)), str(failures), f"{worst.ratio:.2f}", str(seed), style=style)
    console.print(table)
    failed = sum(not outcome.passed for outcome in outcomes)
    if failed:
        console.print(_by_option(outcomes, failed / len(outcomes)))
    rate = len(outcomes) / seconds if seconds else 0.0
    console.print(f"{backend}: {len(outcomes)} cases, {failed} failed, {seconds:.0f} s, {rate:.1f} cases per second")


def _by_option(outcomes: list[Outcome], share: float) -> Table:
    """The options with which the largest share of cases fails."""
    cases: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for outcome in outcomes:
        for name, value in outcome.options.items():
            cases[name, str(value)].append(not outcome.passed)
    table = Table("option", "cases", "failures", "share", title=f"Options of the failures; all: {share:.1%}")
    common = [(key, failed) for key, failed in cases.items() if len(failed) >= min(_LEAST_CASES, len(outcomes))]
    common.sort(key=lambda pair: -sum(pair[1]) / len(pair[1]))
    for (name, value), failed in common[:_MOST_OPTIONS]:
        table.add_row(f"{name}={value}", str(len(failed)), str(sum(failed)), f"{sum(failed) / len(failed):.1%}")
    return table
