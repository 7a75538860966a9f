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
    for path, command in ((cells, "sweep"), (mechanism, "sweep"), (study, "study")):
        if not path.exists():
            raise SystemExit(f"{path} is not there: run `python -m studies.learning {command}` first")
    swept, probed = pd.read_csv(cells), pd.read_csv(mechanism)
    runs = analysis.complete(pd.read_csv(study))
    scores = analysis.stage_scores(runs)
    tables = {
        "cells": cell_report.cell_table(swept),
        "cell-differences": cell_report.difference_table(swept),
        "rates": cell_report.choice_table(swept),
        "mechanism": cell_report.mechanism_table(probed),
        "stages": analysis.stage_table(scores, runs),
        "differences": analysis.difference_table(scores),
        "pretrained": "Not measured yet: `python -m studies.learning pretrained`.",
    }
    if pretrained.exists():
        steps = pretrained_analysis.read(pretrained)
        tables["pretrained"] = pretrained_analysis.table(steps)
        save(pretrained_analysis.curves(steps), figures, "learning_pretrained")
    replace_marked(document, tables)
    save(analysis.curves(runs), figures, "learning")
    save(cell_report.cell_curves(swept), figures, "learning_cells")
    save(cell_report.mechanism_figure(probed), figures, "learning_mechanism")
