"""Compare models over chunk widths: python -m ssm_asr.compare --checkpoints A B … --cuts FILE … --out DIR

Recognises all cuts with every model, chunk by chunk as in use, at every chunk width and left context. Writes to --out:
  report.html           figures, tables, the worst utterances and the configurations, in one file
  chunk_width.png .svg  error rate against chunk width, with 95 % intervals
  state_bytes.png .svg  error rate against the state that a stream takes
  table.md              the tables
  results.json .csv     a row a cell (model × chunk × left context × cuts); in .json the significance, too
  cells/                what was recognised; run the same command again, and only what is missing is decoded
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

from ssm_asr import config
from ssm_asr.compare import cells, figures, page, tables
from ssm_asr.compare.cells import Model, Row
from ssm_asr.compare.significance import compare_models
from ssm_asr.distributed import find_device
from ssm_asr.program import numbers

CAPTIONS = (
    "Error rate against chunk width. Bars are 95 % bootstrap intervals over utterances; what belongs to one chunk "
    "width stands side by side, so that the bars can be told apart.",
    "Error rate against the state that is kept for each stream between chunks, as float32. Intervals are those of the "
    "figure above.",
)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    options = _parser().parse_args(arguments)
    try:
        device = str(find_device(options.device))
        if options.jobs < 1 or options.limit < 0:
            raise ValueError(
                f"--jobs {options.jobs}, --limit {options.limit}: give 1 or more jobs, and no negative limit"
            )
        models = cells.load_models(options.checkpoints, options.names, options.unit)
        sets = cells.load_test_sets(options.cuts, options.limit)
        planned = cells.plan(models, sets, sorted(set(options.chunks)), sorted(set(options.left)), device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    cells.run(planned, options.out / "cells", options.jobs)
    rows = [cells.read_row(cell, options.out / "cells") for cell in planned]
    print(write_report(models, rows, options.out, options.note))
    print(f"report: {options.out / 'report.html'}")
    return 0


def write_report(models: list[Model], rows: list[Row], out: Path, note: str) -> str:
    """Writes everything but the cells, from the cells, and returns the tables of error rates in Markdown.

    Args:
        rows: of `read_row`.
        note: a line to put on top, such as what the speech is; may be empty.
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m ssm_asr.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoints", required=True, nargs="+", type=Path, help="checkpoints, best from average")
    parser.add_argument("--names", nargs="+", help="what to call them (default: the names of their directories)")
    parser.add_argument("--cuts", required=True, nargs="+", type=Path, help="lhotse cuts with transcripts")
    parser.add_argument("--out", required=True, type=Path, help="directory for the results")
    parser.add_argument(
        "--chunks",
        type=numbers,
        default="160,320,640,1280,2560",
        help="chunk widths in ms (default: 160,320,640,1280,2560)",
    )
    parser.add_argument(
        "--left",
        type=numbers,
        default="64,128,256",
        help="left contexts in frames of 20 ms, for models trained with one (default: 64,128,256)",
    )
    parser.add_argument("--limit", type=int, default=0, help="first so many utterances of each manifest; 0 is all")
    parser.add_argument("--unit", choices=["word", "char"], help="error rate of (default: char for char tokens)")
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda (default: cpu)")
    parser.add_argument("--jobs", type=int, default=1, help="cells decoded at the same time (default: 1)")
    parser.add_argument("--note", default="", help="a line to put on top of the report, such as what the speech is")
    return parser
