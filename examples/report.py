"""What a run shows and keeps: a progress bar, a line per step, metrics.csv and curves.png."""

from __future__ import annotations

import csv
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Backward includes the optimizer.
PHASES = ("rollout", "teacher", "student", "loss", "backward")

# Two lines of title, the metric, its format.
COLUMNS = (
    ("", "step", "step", "4d"),
    ("mean", "reward", "reward", "6.2f"),
    ("tokens: policy", "/ idle / sdpo", "shares", ">14s"),
    ("policy", "loss", "policy_loss", "7.3f"),
    ("sdpo", "loss", "sdpo_loss", "6.3f"),
    ("teacher", "entropy", "teacher_entropy", "7.2f"),
    ("weight", "std", "dw_weight_std", "6.2f"),
    ("", "length", "length", "6.1f"),
    ("seconds: rollout / teacher", "/ student / loss / backward", "timing", ">27s"),
)


class RunLog:
    """The record of one run, complete after every step.

    A context manager while the progress bar is on the screen; ``finish`` draws the curves of the steps so far.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.rows: list[dict[str, float]] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self._progress = Progress(
            TextColumn("{task.description:>8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            # A pipe has no width of its own, and wrapped lines are no table.
            console=Console(soft_wrap=True),
        )
        self._bar = self._progress.add_task("start", total=steps)

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what is going on, and add its seconds to the step."""
        self._progress.update(self._bar, description=name)
        start = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - start

    def step(self, metrics: Mapping[str, float]) -> None:
        """Write and print one step."""
        row: dict[str, float] = {"step": len(self.rows) + 1}
        row |= {name.removeprefix("srpo/"): value for name, value in metrics.items()}
        row |= {f"seconds_{name}": self._seconds[name] for name in PHASES}
        self._seconds.clear()
        self.rows.append(row)
        with (self.folder / "metrics.csv").open("w" if row["step"] == 1 else "a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if row["step"] == 1:
                writer.writeheader()
            writer.writerow(row)
        self._print(row)
        self._progress.advance(self._bar)

    def _print(self, row: dict[str, float]) -> None:
        policy, idle, sdpo = token_shares(row)
        cells: dict[str, Any] = row | {
            "shares": f"{policy:.0%} / {idle:.0%} / {sdpo:.0%}",
            "timing": " / ".join(f"{row[f'seconds_{name}']:.1f}" for name in PHASES),
        }
        texts = [format(cells[key], spec) for _, _, key, spec in COLUMNS]
        if row["step"] == 1:
            for line in (0, 1):
                titles = zip(COLUMNS, texts, strict=True)
                self._progress.console.print("  ".join(f"{column[line]:>{len(text)}}" for column, text in titles))
        self._progress.console.print("  ".join(texts), highlight=False)

    def finish(self) -> None:
        """Draw curves.png, and say where everything is."""
        if not self.rows:
            print("no step was completed, nothing is written")
            return
        draw_curves(self.rows, self.folder / "curves.png")
        print(f"{len(self.rows)} steps: {self.folder / 'metrics.csv'}, {self.folder / 'curves.png'}")


def token_shares(row: Mapping[str, float]) -> tuple[float, float, float]:
    """Shares of the reply tokens: policy rows that move a weight, those that do not, distillation rows."""
    sdpo, active = row["sdpo_token_fraction"], row["active_fraction"]
    return active - sdpo, 1 - active, sdpo


def draw_curves(rows: list[dict[str, float]], path: Path) -> None:
    """The run in eight panels."""
    figure = Figure(figsize=(16, 7.5), layout="constrained")
    panels = figure.subplots(2, 4)
    steps = [row["step"] for row in rows]
    curves = {
        "reward": "Mean reward",
        "length": "Reply length (tokens)",
        "teacher_entropy": "Teacher entropy (nats)",
        "dw_weight_std": "Standard deviation of token weights",
        "policy_loss": "Policy loss per token",
        "sdpo_loss": "Distillation loss per token",
    }
    for panel, (name, title) in zip(panels.flat, curves.items(), strict=False):
        panel.plot(steps, [row[name] for row in rows], marker="o")
        panel.set_title(title)
        if name != "policy_loss":
            panel.set_ylim(0, 1 if name == "reward" else 1.2 * max(row[name] for row in rows) or 1)
    shares = zip(*map(token_shares, rows), strict=True)
    stack_bars(panels[1, 2], steps, dict(zip(("policy", "idle", "sdpo"), shares, strict=True)))
    panels[1, 2].set_title("Share of reply tokens by branch")
    stack_bars(panels[1, 3], steps, {name: [row[f"seconds_{name}"] for row in rows] for name in PHASES})
    panels[1, 3].set_title("Seconds")
    for panel in panels.flat:
        panel.set_xlabel("step")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def stack_bars(panel: Any, steps: Sequence[float], parts: Mapping[str, Sequence[float]]) -> None:
    """Stacked bars, one colour per part, explained below the panel."""
    bottom = [0.0] * len(steps)
    for name, values in parts.items():
        panel.bar(steps, values, bottom=bottom, label=name)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncol=3, frameon=False)
