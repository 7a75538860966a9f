"""Tables and pictures of `docs/learning.md`, from the CSV files of the runs."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks.pictures import save
from studies.learning import RESULTS, analysis, cell_report, pretrained_analysis
from tools.documents import replace_marked

_DOCS = Path(__file__).parent.parent.parent / "docs"


def draw(
    cells: Path = RESULTS / "cells.csv",
    mechanism: Path = RESULTS / "mechanism.csv",
    study: Path = RESULTS / "learning.csv",
    pretrained: Path = RESULTS / "learning_pretrained.csv",
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
        "pretrained": "Not measured yet: `python -m studies.learning pretrained`.",
    }
    not_swept = "Not run yet: `python -m studies.learning sweep`."
    tables |= dict.fromkeys(("cells", "cell-differences", "rates", "mechanism"), not_swept)
    if cells.exists():
        swept = pd.read_csv(cells)
        tables["cells"] = cell_report.cell_table(swept)
        tables["cell-differences"] = cell_report.difference_table(swept)
        tables["rates"] = cell_report.choice_table(swept)
        save(cell_report.cell_curves(swept), figures, "learning_cells")
    if mechanism.exists():
        probed = pd.read_csv(mechanism)
        tables["mechanism"] = cell_report.mechanism_table(probed)
        save(cell_report.mechanism_figure(probed), figures, "learning_mechanism")
    if pretrained.exists():
        steps = pretrained_analysis.read(pretrained)
        tables["pretrained"] = pretrained_analysis.table(steps)
        save(pretrained_analysis.curves(steps), figures, "learning_pretrained")
    replace_marked(document, tables)
    save(analysis.curves(runs), figures, "learning")
