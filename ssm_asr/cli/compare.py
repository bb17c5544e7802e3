"""Compare models over chunk widths: ssm-asr compare --checkpoints A B … --cuts FILE … --out DIR

Recognises all cuts with every model, chunk by chunk as in use, at every chunk width and left context. Writes to --out:
  report.html           figures, tables, the worst utterances and the configurations, in one file
  chunk_width.png .svg  error rate against chunk width, with 95 % intervals
  state_bytes.png .svg  error rate against the state that a stream takes
  table.md              the tables
  results.json .csv     a row for each cell (model × chunk × left context × cuts); in .json the significance, too
  cells/                what was recognised; run the command again, and only what is missing is decoded
"""

import argparse
import sys
from pathlib import Path

from ssm_asr.cli.arguments import frames_list, trust_arguments
from ssm_asr.evaluation.compare import cells
from ssm_asr.evaluation.compare.report import write_report
from ssm_asr.evaluation.test_sets import start_reading
from ssm_asr.ops.devices import find_device

LEAST_MS = 160  # 160 frames would be a chunk of 3.2 s


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    options = _parser().parse_args(arguments)
    try:
        device = find_device(options.device)
        start_reading(device)
        if options.jobs < 1 or options.limit < 0:
            raise ValueError(
                f"--jobs {options.jobs}, --limit {options.limit}: give 1 or more jobs, and no negative limit"
            )
        models = cells.load_models(options.checkpoints, options.names, options.unit)
        sets = cells.load_test_sets(options.cuts, options.limit)
        planned = cells.plan(models, sets, sorted(set(options.chunks)), sorted(set(options.left)), str(device))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    cells.run(planned, options.out / "cells", options.jobs)
    rows = [cells.read_row(cell, options.out / "cells") for cell in planned]
    print(write_report(models, rows, options.out, options.note))
    print(f"report: {options.out / 'report.html'}")
    return 0


def _chunk_widths(text: str) -> list[int]:
    """A type of arguments as `frames_list`, but for numbers that can only be meant in ms, as they once were here."""
    for part in text.split(","):
        if part.isdecimal() and int(part) >= LEAST_MS:
            raise argparse.ArgumentTypeError(f"{part}: a bare number is frames of 20 ms; write {part}ms")
    return frames_list(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "ssm-asr compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoints", required=True, nargs="+", type=Path, help="checkpoints, best from average")
    parser.add_argument("--names", nargs="+", help="what to call them (default: the names of their directories)")
    parser.add_argument("--cuts", required=True, nargs="+", type=Path, help="lhotse cuts with transcripts")
    parser.add_argument("--out", required=True, type=Path, help="directory for the results")
    parser.add_argument(
        "--chunks",
        type=_chunk_widths,
        metavar="TIME,…",
        default="160ms,320ms,640ms,1280ms,2560ms",
        help="with their units, or as bare numbers of frames of 20 ms (default: %(default)s)",
    )
    parser.add_argument(
        "--left",
        type=frames_list,
        metavar="TIME,…",
        default="1280ms,2560ms,5120ms",
        help="left contexts, for models trained with one (default: %(default)s)",
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=0,
        help="utterances to take of each manifest, from the first on; 0 is all (default: 0)",
    )
    parser.add_argument("--unit", choices=["word", "char"], help="error rate of (default: char for char tokens)")
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda (default: cpu)")
    parser.add_argument("--jobs", type=int, default=1, help="cells decoded at once (default: 1)")
    parser.add_argument("--note", default="", help="a line to put on top of the report, such as what the speech is")
    trust_arguments(parser)
    return parser
