"""Tables and pictures of `docs/learning.md`, from the CSV files of the runs."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks.pictures import save
from studies.learning import RESULTS, analysis, cell_report
from tools.documents import replace_marked

_NOT_RUN = "Not run yet: `python -m studies.learning {}`."
_DOCS = Path(__file__).parent.parent.parent / "docs"


def draw(
    cells: Path = RESULTS / "cells.csv",
    mechanism: Path = RESULTS / "mechanism.csv",
    study: Path = RESULTS / "learning.csv",
    pretrained: Path = RESULTS / "smollm2.csv",
    document: Path = _DOCS / "learning.md",
    figures: Path = _DOCS / "figures",
) -> None:
    """Draw the curves and write the tables of `docs/learning.md`.

    Args:
        cells: CSV file that `sweep` wrote.
        mechanism: the other one.
        study: CSV file that `study` wrote.
        pretrained: CSV file that `pretrained` wrote.
        document: takes the tables, between its markers.
        figures: folder for the pictures.
    """
    if not study.exists():
        raise SystemExit(f"{study} is not there: run `python -m studies.learning study` first")
    runs = analysis.complete(pd.read_csv(study))
    scores = analysis.stage_scores(runs)
    tables = {
        "stages": analysis.stage_table(scores, runs),
        "differences": analysis.difference_table(scores),
        "mechanism": _NOT_RUN.format("sweep"),
    }
    for path, command, prefix in ((cells, "sweep", "cells"), (pretrained, "pretrained", "pretrained")):
        names = (prefix, f"{prefix}-differences", f"{prefix}-rates")
        tables |= dict.fromkeys(names, _NOT_RUN.format(command))
        if path.exists():
            rows = pd.read_csv(path)
            made = cell_report.cell_table(rows), cell_report.difference_table(rows), cell_report.choice_table(rows)
            tables |= dict(zip(names, made, strict=True))
            save(cell_report.cell_curves(rows), figures, f"learning_{prefix}")
            save(cell_report.difference_figure(rows), figures, f"learning_{prefix}_differences")
    if mechanism.exists():
        probed = pd.read_csv(mechanism)
        tables["mechanism"] = cell_report.mechanism_table(probed)
        save(cell_report.mechanism_figure(probed), figures, "learning_mechanism")
    replace_marked(document, tables)
    save(analysis.curves(runs), figures, "learning")
