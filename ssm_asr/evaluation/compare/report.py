"""A comparison is written as tables, figures, rows and one page."""

import csv
import json
from pathlib import Path
from typing import Any

from ssm_asr import config
from ssm_asr.evaluation.compare import cells, figures, page, tables
from ssm_asr.evaluation.compare.cells import Model, Row
from ssm_asr.evaluation.compare.significance import compare_models

CAPTIONS = (
    "Error rate against chunk width. Bars are 95 % bootstrap intervals over utterances; what belongs to one chunk "
    "width stands side by side, so that the bars can be told apart.",
    "Error rate against the state that is kept for each stream between chunks, as float32. The figure above shows "
    "the intervals.",
)


def write_report(models: list[Model], rows: list[Row], out: Path, note: str) -> str:
    """Writes tables, figures, rows and the page into `out`, and returns the tables of error rates in Markdown.

    Args:
        rows: the cells, as `read_row` reads them.
        out: the directory of the comparison, whose subdirectory cells/ holds the cells.
        note: a line to put on top, such as what the speech is; it may be empty.
    """
    comparisons = compare_models(rows, out / "cells")
    commit = cells.current_commit()
    _write_rows(models, rows, comparisons, commit, out)
    rates = list(tables.rate_tables(rows))
    rest = [tables.significance_table(comparisons, figures.rate_name(rows))] if comparisons else []
    rest += [tables.cost_table(rows), tables.models_table(rows)]
    text = "\n".join(tables.markdown(table) for table in [*rates, *rest])
    (out / "table.md").write_text(f"{note}\n\n{text}" if note else text, encoding="utf-8")
    svgs = (
        figures.save(figures.chunk_width_figure, rows, out / "chunk_width"),
        figures.save(figures.state_bytes_figure, rows, out / "state_bytes"),
    )
    drawn = list(zip(svgs, CAPTIONS, strict=True))
    worst = list(page.worst_utterances(rows, out / "cells"))
    text = page.html(models, rows, [*rates, *rest], drawn, worst, commit, note)
    (out / "report.html").write_text(text, encoding="utf-8")
    return "\n".join(tables.markdown(table) for table in rates)


def _write_rows(
    models: list[Model], rows: list[Row], comparisons: list[dict[str, Any]], commit: str, out: Path
) -> None:
    described = [
        {"name": model.name, "checkpoint": str(model.checkpoint), "config": config.to_dict(model.experiment)}
        for model in models
    ]
    tree = {"commit": commit, "cells": rows, "significance": comparisons, "models": described}
    (out / "results.json").write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with open(out / "results.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow(row | {"asked_left_frames": " ".join(map(str, row["asked_left_frames"]))})
