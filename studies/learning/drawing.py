"""Tables, pictures and statistics of `docs/learning.md`, from the CSV files of the runs."""

from __future__ import annotations

import pandas as pd

from benchmarks.pictures import save
from studies.learning import analysis, cell_report, summary
from studies.learning.options import Draw
from tools.documents import replace_marked

_NOT_RUN = "Not run yet: `python -m studies.learning {}`."


def draw(options: Draw) -> None:
    """What ``Draw`` describes."""
    if not options.study.exists():
        raise SystemExit(f"{options.study} is not there: run `python -m studies.learning study` first")
    runs = analysis.complete(pd.read_csv(options.study))
    scores = analysis.stage_scores(runs)
    tables = {
        "stages": analysis.stage_table(scores, runs),
        "differences": analysis.difference_table(scores),
        "mechanism": _NOT_RUN.format("sweep"),
    }
    statistics = list(summary.study_rows(runs, scores))
    for path, command, prefix in ((options.cells, "sweep", "cells"), (options.pretrained, "pretrained", "pretrained")):
        names = (prefix, f"{prefix}-differences", f"{prefix}-rates")
        tables |= dict.fromkeys(names, _NOT_RUN.format(command))
        if path.exists():
            rows = pd.read_csv(path)
            made = cell_report.cell_table(rows), cell_report.difference_table(rows), cell_report.choice_table(rows)
            tables |= dict(zip(names, made, strict=True))
            statistics += summary.cell_rows(rows)
            save(cell_report.cell_curves(rows), options.figures, f"learning_{prefix}")
            save(cell_report.difference_figure(rows), options.figures, f"learning_{prefix}_differences")
    if options.mechanism.exists():
        probed = pd.read_csv(options.mechanism)
        tables["mechanism"] = cell_report.mechanism_table(probed)
        statistics += summary.mechanism_rows(probed)
        save(cell_report.mechanism_figure(probed), options.figures, "learning_mechanism")
    summary.write(statistics, options.summary)
    replace_marked(options.document, tables)
    save(analysis.curves(runs), options.figures, "learning")
