"""``python -m tools.peers.suites --liger CHECKOUT ...``: the loss tests of peers, run with this library."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from srpo_kernels.verify.command_line import parse

if TYPE_CHECKING:
    import pandas as pd

    from tools.peers.suites.suite import Suite

_PEERS = ("liger", "cce", "quack", "trl", "trl_trainer", "verl")
_ROOT = Path(__file__).parents[3]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Run the loss tests of peers with this library in the place of their functions.

    A test passes, or what it asks for has no counterpart here, which is named and counted, or it fails. Exits with 1
    where one fails. Sizes are reduced to what a CPU can do, and further for Triton, which runs in its interpreter.
    """

    liger: Path | None = None
    """A checkout of linkedin/Liger-Kernel."""
    cce: Path | None = None
    """A checkout of apple/ml-cross-entropy."""
    quack: Path | None = None
    """A checkout of Dao-AILab/quack."""
    trl: Path | None = None
    """A checkout of huggingface/trl."""
    trl_trainer: Path | None = None
    """The same, for the tests of its GRPOTrainer, with SRPOTrainer in the place of the installed one."""
    verl: Path | None = None
    """A checkout of volcengine/verl."""
    backend: Literal["torch", "triton"] = "torch"
    select: str = ""
    """Of their tests those that pytest's -k takes."""
    every: int = 1
    """Of those that have a counterpart one in so many: a sample, where all of them take hours."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = parse(Options, "python -m tools.peers.suites", arguments)
    checkouts = {peer: checkout for peer in _PEERS if (checkout := getattr(options, peer)) is not None}
    outcomes = [
        outcome
        for peer, checkout in checkouts.items()
        for outcome in run(peer, checkout.resolve(), options.backend, options.select, options.every)
    ]
    if not outcomes:
        raise SystemExit("no test was run: give the checkout of a peer")
    # Imported here, so that --help need not wait for it.
    import pandas as pd

    return show(pd.DataFrame(outcomes), options.backend)


def run(peer: str, checkout: Path, backend: str, select: str = "", every: int = 1) -> list[dict[str, str]]:
    """The outcome of every test: ``peer``, ``file``, ``test``, ``outcome``, ``reason``."""
    suite: Suite = importlib.import_module(f"tools.peers.suites.{peer}").SUITE
    missing = [test for test in suite.tests if not (checkout / test.split("::")[0]).is_file()]
    if missing:
        raise SystemExit(f"{checkout} has no {missing}: another version of {suite.peer}?")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        if suite.tests_alone:
            shutil.copytree(checkout / "tests", Path(folder, "tests"))
            checkout = Path(folder)
        paths = [str(_ROOT), *(str(checkout / path) for path in suite.paths)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths), "SRPO_PEER": peer, "SRPO_PEER_BACKEND": backend,
            "SRPO_PEER_REPORT": str(report), "SRPO_PEER_EVERY": str(every), "TORCHDYNAMO_DISABLE": "1",
            "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(Path(folder, "hub")),
        }  # fmt: skip
        # Of their settings of pytest none is read: they are for their own runs.
        command = [sys.executable, "-m", "pytest", "-p", "tools.peers.suites.plugin", "-c", os.devnull, "-q"]
        command += [
            "--rootdir",
            str(checkout),
            "--tb=short",
            "--continue-on-collection-errors",
            "-p",
            "no:cacheprovider",
            *(["-k", select] if select else []),
        ]
        command += [] if suite.conftest else ["--noconftest"]
        subprocess.run([*command, *suite.tests], cwd=checkout, env=environment, check=False)
        if not report.is_file():
            raise SystemExit(f"pytest did not run the tests of {suite.peer}")
        found = json.loads(report.read_text())
    return [{"peer": suite.peer, "file": outcome["test"].split("::")[0], **outcome} for outcome in found]


def show(outcomes: pd.DataFrame, backend: str) -> int:
    """Print the tables; 1 where a test has failed."""
    import pandas as pd
    from rich.console import Console

    from tools.documents import print_table, rich_table

    console = Console(highlight=False)
    counts = outcomes.groupby(["peer", "file"], sort=False)["outcome"].value_counts().unstack(fill_value=0)
    counts = counts.reindex(columns=["passed", "no counterpart", "failed"], fill_value=0).reset_index()
    print_table(console, rich_table(counts, "tests", f"the peers' tests with backend={backend!r}"))
    for outcome in ("no counterpart", "failed"):
        reasons = Counter(
            (row.peer, row.file, row.reason) for row in outcomes[outcomes["outcome"] == outcome].itertuples()
        )
        lines = [{"peer": p, "file": f, "reason": r, "tests": n} for (p, f, r), n in reasons.items()]
        if lines:
            print_table(console, rich_table(pd.DataFrame(lines), outcome, ""))
    return int((outcomes["outcome"] == "failed").any())


if __name__ == "__main__":
    sys.exit(main())
